"""The app that is measured: the smallest answer, so that the server and not the app is seen."""

from typing import Any


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer every request with ``hello``."""
    await send(
        {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", b"5"), (b"content-type", b"text/plain")],
        }
    )
    await send({"type": "http.response.body", "body": b"hello"})
