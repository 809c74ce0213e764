"""A Django project behind a public URL: what holds in the process that serves it, and only there."""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import Any

import django
from django.apps import apps
from django.conf import settings
from django.contrib.staticfiles.handlers import ASGIStaticFilesHandler
from django.core.asgi import get_asgi_application
from django.core.management.base import BaseCommand, SystemCheckError
from django.core.signals import request_started
from django.db import connections
from django.template.autoreload import reset_loaders

from tunnel_asgi.config import PublicURL
from tunnel_asgi.errors import AppLoadFailed
from tunnel_asgi.server import Config, Server
from tunnel_asgi.supervisor import Supervisor

__all__ = ["DjangoConfig", "run"]

DEFAULT_APP = "django.core.asgi:get_asgi_application"

DEBUG_HOSTS = (".localhost", "127.0.0.1", "[::1]")
"""What Django itself allows in DEBUG, as long as ALLOWED_HOSTS is empty."""


LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi", "tunnel_asgi")
INSTALLED_IN = frozenset({"site-packages", "dist-packages"})


class DjangoConfig(Config):
    """``Config`` for the project of DJANGO_SETTINGS_MODULE.

    Serves ASGI_APPLICATION where the settings name one, otherwise Django's own ASGI handler, whatever
    WSGI_APPLICATION says. ``static``: also static files, in DEBUG. ``checks``: system checks come first, and their
    errors keep the project from being served. Other options: see ``Config``.

    To be made before the project is served, from the settings as they are then; a worker process sets up its own.
    """

    def __init__(self, *, static: bool = True, checks: bool = True, **options: Any) -> None:
        self._static = static
        self._checks = checks
        self._application: Any = None
        named = getattr(settings, "ASGI_APPLICATION", None)
        app = ":".join(named.rsplit(".", 1)) if named else DEFAULT_APP
        # Django's own handler has no lifespan, and would say so each time.
        defaults: dict[str, Any] = {"lifespan": "auto" if named else "off"}
        if options.get("reload"):
            defaults["reload_dirs"] = _folders_to_watch()
        super().__init__(app, **(defaults | options))

    def load_app(self) -> Any:
        """The project's ASGI app, made once. The relay of ``local`` must run.

        Raises:
            AppLoadFailed: as ``Config``, and when a system check fails.
        """
        if self._application is None:
            self._application = self._make_application()
        return self._application

    def _make_application(self) -> Any:
        assert self.public_url is not None
        _admit(self.public_url, keep_debug_hosts=self.local)
        django.setup()
        self._check()
        if self.should_reload:
            # Django keeps templates, and its own reloader, which we do not use, would drop those that were edited.
            request_started.connect(_forget_templates)
        application = get_asgi_application() if self.app == DEFAULT_APP else super().load_app()
        _revive_loggers()
        if self._static and settings.DEBUG and apps.is_installed("django.contrib.staticfiles"):
            return ASGIStaticFilesHandler(application)
        return application

    def _check(self) -> None:
        command = BaseCommand()
        if self._checks:
            command.stdout.write("Performing system checks...\n\n")
            try:
                command.check(display_num_errors=True)
            except SystemCheckError as error:
                raise AppLoadFailed(str(error)) from error
        command.check_migrations()
        command.stdout.flush()
        for connection in connections.all(initialized_only=True):
            connection.close()  # of this thread, where no request will be served


def run(config: DjangoConfig) -> None:
    """Serve until a signal comes. Blocking, as ``tunnel_asgi.run``.

    Raises:
        TunnelError: as ``Config`` and ``Server.serve``. Exceptions of the project's own modules pass through.
    """
    with contextlib.suppress(KeyboardInterrupt), config.embedded_relay():
        if config.should_reload:
            Supervisor(config).run()
            return
        config.load_app()  # outside the loop: Django's checks may ask the database
        Server(config).run()


def _admit(public_url: PublicURL, *, keep_debug_hosts: bool) -> None:
    """Let requests for the public URL, exactly, through Django's own checks of host and origin."""
    host = f"[{public_url.host}]" if ":" in public_url.host else public_url.host
    allowed = list(settings.ALLOWED_HOSTS)
    if not allowed and settings.DEBUG and keep_debug_hosts:
        allowed += DEBUG_HOSTS
    settings.ALLOWED_HOSTS = [*allowed, host]
    settings.CSRF_TRUSTED_ORIGINS = [*settings.CSRF_TRUSTED_ORIGINS, str(public_url)]
    # No proxy stands before this process: what one would say about itself here a visitor says.
    settings.SECURE_PROXY_SSL_HEADER = None
    settings.USE_X_FORWARDED_HOST = settings.USE_X_FORWARDED_PORT = False


def _revive_loggers() -> None:
    """A project's LOGGING turns off every logger it does not name, unless it says otherwise."""
    for name in LOGGERS:
        logging.getLogger(name).disabled = False


def _forget_templates(**kwargs: Any) -> None:
    reset_loaders()


def _folders_to_watch() -> list[str]:
    """The folder of manage.py (or the current one), and those of apps elsewhere that are not installed packages."""
    program = Path(sys.argv[0]).resolve()
    folders = [program.parent if program.name == "manage.py" else Path.cwd()]
    for app in apps.get_app_configs():
        path = Path(app.path).resolve()
        is_installed = INSTALLED_IN & {*path.parts} or path == Path(__file__).parent
        if not is_installed and not any(path.is_relative_to(folder) for folder in folders):
            folders.append(path)
    return [str(folder) for folder in folders]
