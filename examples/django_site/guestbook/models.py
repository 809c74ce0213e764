"""What is kept."""

from django.db import models


class Note(models.Model):
    """What a visitor wrote."""

    text = models.CharField(max_length=280)
    written = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return str(self.text)
