"""``python -m tunnel_asgi``."""

from tunnel_asgi.cli import tunnel_asgi

tunnel_asgi()
