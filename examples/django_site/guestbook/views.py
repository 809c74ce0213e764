"""The page of the guest book."""

from django.forms import modelform_factory
from django.http import HttpRequest, HttpResponse
from django.shortcuts import redirect, render

from .models import Note

LATEST = 50  # notes on the page

NoteForm = modelform_factory(Note, fields=["text"])


def book(request: HttpRequest) -> HttpResponse:
    """Show the latest notes; take a new one."""
    form = NoteForm(request.POST or None)
    if form.is_valid():
        form.save()
        return redirect(request.build_absolute_uri())
    notes = Note.objects.order_by("-id")[:LATEST]
    context = {
        "form": form,
        "notes": notes,
        "address": request.META["REMOTE_ADDR"],
        "url": request.build_absolute_uri(),
    }
    return render(request, "book.html", context, status=400 if form.errors else 200)
