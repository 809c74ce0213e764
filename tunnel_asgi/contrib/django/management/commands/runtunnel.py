"""``manage.py runtunnel``: what runserver does, behind a public URL."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from tunnel_asgi.contrib.django.options import OPTIONS, settle
from tunnel_asgi.contrib.django.site import DjangoConfig, run
from tunnel_asgi.errors import TunnelError

STARTUP_FAILURE = 3  # exit code, as uvicorn's and that of tunnel-asgi

METAVARS = {"domain": "NAME", "trust_ca": "FILE", "standby": "NUMBER", "limit_body": "BYTES"}

DEBUG_WARNING = """\
WARNING: DEBUG is True, and everybody who has the URL is a visitor.
Whoever makes a request fail sees your source code around it, the values of local variables (with them SQL and what came
from the environment or a visitor), the settings except those whose names look secret, and the URLs there are.
Share the URL only with people you trust, or set DEBUG = False.
"""


class Command(BaseCommand):
    """Serves this project through a tunnel. No port is opened."""

    help = (
        "Serves this project through a tunnel, as runserver does on a port: with autoreload, and static files in "
        "DEBUG. The public host joins ALLOWED_HOSTS and its origin CSRF_TRUSTED_ORIGINS, for this process only. "
        "Defaults come from the setting TUNNEL_ASGI, then from the environment (SMALLWARE_KEY, SMALLWARE_DOMAIN...). "
        "Without an account: --local."
    )
    requires_system_checks = ()  # the process that serves makes them, each time it is started

    def add_arguments(self, parser: CommandParser) -> None:
        for name, option in OPTIONS.items():
            flag = option.flag or f"--{name.replace('_', '-')}"
            kind: dict[str, Any] = {"type": option.type, "metavar": _metavar(name)}
            if option.type is bool:
                kind = {"action": "store_true"}
            parser.add_argument(flag, dest=name, default=None, help=option.help, **kind)
        parser.add_argument("--noreload", action="store_false", dest="reload", help="Do not reload when code changes.")
        parser.add_argument("--nostatic", action="store_false", dest="static", help="Do not serve static files.")
        parser.add_argument("--skip-checks", action="store_true", help="Skip system checks.")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["key"]:
            self._warn("Warning: --key shows in the process list; set SMALLWARE_KEY or use --key-file instead.")
        try:
            config = DjangoConfig(
                reload=options["reload"],
                static=options["static"],
                checks=not options["skip_checks"],
                **settle(options, getattr(settings, "TUNNEL_ASGI", {})),
            )
            if settings.DEBUG and not config.local:
                self._warn(DEBUG_WARNING)
            run(config)
        except TunnelError as error:
            raise CommandError(str(error), returncode=STARTUP_FAILURE) from error

    def _warn(self, text: str) -> None:
        self.stderr.write(text, self.style.ERROR)


def _metavar(name: str) -> str:
    if name.startswith("timeout"):
        return "SECONDS"
    return METAVARS.get(name) or name.rpartition("_")[2].upper()
