"""A Flask app worth sharing: who is visiting, an upload that is hashed, and a clock that ticks.

tunnel-asgi app:app --interface wsgi --local
"""

import hashlib
import time
from collections.abc import Iterator

from flask import Flask, Response, request

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Hello from Flask</title>
<h1>Hello from Flask</h1>
<p id="clock">The clock starts ...</p>
<form method="post" action="/upload" enctype="multipart/form-data">
  <input type="file" name="file" required aria-label="A file"> <button>Hash it</button>
</form>
<script>
  new EventSource("/ticks").onmessage = tick => document.getElementById("clock").textContent = tick.data
</script>
</html>
"""
BLOCK = 64 * 1024  # bytes

app = Flask(__name__)


@app.get("/")
def page() -> str:
    return PAGE


@app.get("/visit")
def visit() -> dict[str, str | None]:
    return {"address": request.remote_addr, "url": request.url_root}


@app.get("/ticks")
def ticks() -> Response:
    """One event per second, until the visitor leaves. A visitor holds one of 40 threads meanwhile."""

    def events() -> Iterator[str]:
        while True:
            yield f"data: {time.strftime('%X')}\n\n"
            time.sleep(1)

    return Response(events(), mimetype="text/event-stream")


@app.post("/upload")
def upload() -> dict[str, str | int]:
    file, digest, size = request.files["file"], hashlib.sha256(), 0
    while block := file.read(BLOCK):
        digest.update(block)
        size += len(block)
    return {"bytes": size, "sha256": digest.hexdigest()}
