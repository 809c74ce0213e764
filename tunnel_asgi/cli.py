"""The command line. Only here errors become exit codes."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from importlib.metadata import version
from typing import Any, NoReturn, TextIO

import click
from click.core import ParameterSource
from uvicorn.config import STARTUP_FAILURE
from uvicorn.main import main as uvicorn_command

from tunnel_asgi.config import DEFAULT_SERVER_URL, TunnelConfig
from tunnel_asgi.errors import TunnelError
from tunnel_asgi.guard import Timeouts
from tunnel_asgi.pool import STANDBY
from tunnel_asgi.server import GRACEFUL_SHUTDOWN, SOCKET_OPTIONS, logging_config
from tunnel_asgi.supervisor import run

__all__ = ["tunnel_asgi"]

IGNORED_UVICORN_OPTIONS = (SOCKET_OPTIONS - {"ssl_context_factory"}) | {"port", "version"}
"""uvicorn's command line options that are not taken over. Every other one, also a future one, is."""

DIFFERENT_DEFAULTS: dict[str, Any] = {
    "http": "h11",
    "proxy_headers": False,
    "timeout_graceful_shutdown": GRACEFUL_SHUTDOWN,
}

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # section 5.5

EPILOG = "Without an account: tunnel-asgi main:app --local"


def _uvicorn_parameters() -> list[click.Parameter]:
    """uvicorn's own parameters, those about sockets left out."""
    taken = [copy.copy(one) for one in uvicorn_command.params if one.name not in IGNORED_UVICORN_OPTIONS]
    for parameter in taken:
        if isinstance(parameter, click.Option) and parameter.name in DIFFERENT_DEFAULTS:
            parameter.default = DIFFERENT_DEFAULTS[parameter.name]
            parameter.show_default = True
        if parameter.name == "app":
            parameter.envvar = "TUNNEL_ASGI_APP"
    return taken


def _with_uvicorn_parameters(command: click.Command) -> click.Command:
    command.params += _uvicorn_parameters()
    return command


class LogHandler(logging.StreamHandler[TextIO]):
    """A log whose reader may go (``tunnel-asgi ... | head``): the app is then served without one."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exception(), BrokenPipeError):
            super().handleError(record)
            return
        with open(os.devnull, "w") as nowhere:  # noqa: PTH123
            os.dup2(nowhere.fileno(), self.stream.fileno())


def _log_config() -> dict[str, Any]:
    config = logging_config()
    for handler in config["handlers"].values():
        handler["class"] = f"{LogHandler.__module__}.{LogHandler.__qualname__}"
    return config


def _open_missing_streams() -> None:
    """A process may be started without them. A socket would get their numbers, and libuv aborts on that."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: PTH123, SIM115  (as long as the process)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def _fail(message: object, code: int) -> NoReturn:
    click.secho(f"Error: {message}", err=True, fg="red")
    sys.exit(code)


@_with_uvicorn_parameters
@click.command(context_settings={"auto_envvar_prefix": "TUNNEL_ASGI"}, epilog=EPILOG)
@click.option(
    "--domain",
    envvar="SMALLWARE_DOMAIN",
    metavar="NAME",
    help="Public name, such as www-blog-acme.e0.smallware.io.",
)
@click.option(
    "--key",
    metavar="KEY",
    help="Access key. Other users of this machine can read it in the process list: rather set SMALLWARE_KEY, "
    "or use --key-file.",
)
@click.option("--key-file", type=click.Path(dir_okay=False), help="File that holds the access key.")
@click.option("--key-id", envvar="SMALLWARE_KEY_ID", metavar="ID", help="Makes the whole key the secret of this id.")
@click.option(
    "--server",
    "server_url",
    envvar="SMALLWARE_SERVER",
    metavar="URL",
    help=f"Tunnel server. [default: {DEFAULT_SERVER_URL}]",
)
@click.option(
    "--trust-ca",
    envvar="SMALLWARE_TRUST_CA",
    type=click.Path(dir_okay=False),
    help="PEM file with a CA to trust in addition to the system's.",
)
@click.option(
    "--allow-insecure-server", is_flag=True, help="Allow ws:// to another machine. The token travels in clear."
)
@click.option(
    "--public-url",
    metavar="URL",
    help="What visitors open, if it is not https://DOMAIN. Decides the scheme and server the app sees.",
)
@click.option("--local", is_flag=True, help="No account: an embedded relay on loopback serves visitors.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    metavar="PORT",
    default=8000,
    show_default=True,
    help="With --local: port; 0 for any free one.",
)
@click.option("--tls", is_flag=True, help="With --local: https, with a development CA made on the spot.")
@click.option(
    "--standby",
    type=click.IntRange(1),
    metavar="NUMBER",
    default=STANDBY,
    show_default=True,
    help="WebSockets that wait for visitors when nobody is connected.",
)
@click.option(
    "--timeout-first-byte",
    type=click.FloatRange(0),
    metavar="SECONDS",
    default=Timeouts.first_byte,
    show_default=True,
    help="Time a visitor may take to begin a request. 0: no limit, also below.",
)
@click.option(
    "--timeout-request-head",
    type=click.FloatRange(0),
    metavar="SECONDS",
    default=Timeouts.head,
    show_default=True,
    help="Time from the first byte of a request to the end of its headers.",
)
@click.option(
    "--timeout-request-body",
    type=click.FloatRange(0),
    metavar="SECONDS",
    default=Timeouts.body,
    show_default=True,
    help="Time a visitor may pause within a request body.",
)
@click.option(
    "--timeout-write",
    type=click.FloatRange(0),
    metavar="SECONDS",
    default=TunnelConfig.write_timeout,
    show_default=True,
    help="Time a visitor may read nothing of an answer that waits for it.",
)
@click.option(
    "--limit-body",
    type=click.IntRange(0),
    metavar="BYTES",
    default=None,
    help="Answer 413 to a request with a larger body. [default: no limit]",
)
@click.version_option(version("tunnel-asgi"), prog_name="tunnel-asgi")
@click.pass_context
def tunnel_asgi(context: click.Context, /, **options: Any) -> None:
    """Serve the ASGI app APP, such as main:app, through a tunnel. No port is opened.

    The access key comes from SMALLWARE_KEY or --key-file.
    """
    _open_missing_streams()
    if _is_given(context, "key"):
        click.secho(
            "Warning: --key shows in the process list; set SMALLWARE_KEY or use --key-file instead.",
            err=True,
            fg="yellow",
        )
    _settle_local(context, options)
    if options["log_config"] is None:
        options["log_config"] = _log_config()
    options["headers"] = [_header(text) for text in options["headers"]]
    for name in ("reload_dirs", "reload_includes", "reload_excludes"):
        options[name] = list(options[name]) or None
    try:
        run(**options)
    except TunnelError as error:
        _fail(error, STARTUP_FAILURE)


def _is_given(context: click.Context, name: str) -> bool:
    """Whether the option stands on the command line itself."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _settle_local(context: click.Context, options: dict[str, Any]) -> None:
    """What the environment says about the real tunnel does not stand in the way of --local."""
    if options["local"]:
        for name in ("domain", "server_url"):
            options[name] = options[name] if _is_given(context, name) else None
        return
    for name in ("port", "tls"):
        if _is_given(context, name):
            raise click.UsageError(f"--{name} belongs to --local; a tunnel opens no port")


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    value = value.strip()
    if not colon or not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
        raise click.BadParameter(f"{text!r} is not of the form Name:Value", param_hint="--header")
    return name, value
