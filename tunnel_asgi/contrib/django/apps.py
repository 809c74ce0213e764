"""How Django knows the app."""

from __future__ import annotations

from django.apps import AppConfig

__all__ = ["TunnelAsgiConfig"]


class TunnelAsgiConfig(AppConfig):
    """Named here, because the last part of the package's name says nothing."""

    name = "tunnel_asgi.contrib.django"
    label = "tunnel_asgi"
    verbose_name = "tunnel-asgi"
