"""The command line. Only here errors become exit codes."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import PurePath
from typing import Any, NoReturn, TextIO, TypeVar

import click
from click.core import ParameterSource
from uvicorn.config import STARTUP_FAILURE
from uvicorn.main import main as uvicorn_command

from tunnel_asgi.config import DEFAULT_SERVER_URL, TunnelConfig
from tunnel_asgi.errors import AppLoadFailed, ConfigError, TunnelError
from tunnel_asgi.guard import Timeouts
from tunnel_asgi.pool import STANDBY
from tunnel_asgi.server import DIFFERENT_DEFAULTS, SOCKET_OPTIONS, logging_config
from tunnel_asgi.supervisor import run
from tunnel_asgi.tracebacks import failed_while_loading, print_app_frames

__all__ = ["tunnel_asgi"]

IGNORED_UVICORN_OPTIONS = (SOCKET_OPTIONS - {"ssl_context_factory"}) | {"port", "version"}
"""uvicorn's command line options that are not taken over. Every other one, also a future one, is."""

_Function = TypeVar("_Function", bound=Callable[..., Any])

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 section 5.6.2
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")  # section 5.5

NO_PORT = "a tunnel opens no port"
VISITORS_TLS = "the visitor's TLS ends at the tunnel server"

ONLY_LOCAL = {"port": NO_PORT, "tls": VISITORS_TLS}
"""Our options that go with ``--local``, and why."""


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


def _is_uvicorns(parameter: click.Parameter) -> bool:
    theirs = {one.name for one in uvicorn_command.params} - IGNORED_UVICORN_OPTIONS
    return parameter.name in theirs


def _why_left_out(option: str) -> str | None:
    """A word about uvicorn's options for sockets, which its users will try."""
    name = option.lstrip("-").replace("-", "_")
    if name not in SOCKET_OPTIONS:
        return None
    if name.startswith("ssl"):
        return f"there is no {option}: {VISITORS_TLS}. For https on this machine: --local --tls"
    if name == "http2":
        return f"there is no {option}: the tunnel carries HTTP/1.1. Leave it out"
    return f"there is no {option}: {NO_PORT}, and --local serves 127.0.0.1 only. Leave it out"


class Command(click.Command):
    """Tells our options from uvicorn's in its help, and knows those of uvicorn that have no meaning here."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if reason := _why_left_out(error.option_name):
                raise click.UsageError(reason, ctx) from None
            raise
        except click.MissingParameter:  # only APP must be there
            raise click.UsageError("APP is missing: name the module and the app in it, such as main:app", ctx) from None

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        options = [one for one in self.get_params(ctx) if isinstance(one, click.Option)]
        for title, uvicorns in (("Options", False), ("Options of uvicorn, with its meaning", True)):
            records = [one.get_help_record(ctx) for one in options if _is_uvicorns(one) is uvicorns]
            with formatter.section(title):
                formatter.write_dl([record for record in records if record is not None])


def _seconds(option: str, default: float, text: str) -> Callable[[_Function], _Function]:
    """The option for a deadline."""
    return click.option(
        option, type=click.FloatRange(0), metavar="SECONDS", default=default, show_default=True, help=text
    )


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


def _fail(error: TunnelError) -> NoReturn:
    click.secho(f"Error: {error}", err=True, fg="red")
    sys.exit(STARTUP_FAILURE)


@_with_uvicorn_parameters
@click.command(cls=Command, context_settings={"auto_envvar_prefix": "TUNNEL_ASGI"})
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
@click.option("--key-file", type=click.Path(), metavar="FILE", help="File that holds the access key.")
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
    type=click.Path(),
    metavar="FILE",
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
@_seconds(
    "--timeout-first-byte", Timeouts.first_byte, "Time a visitor may take to begin a request. 0: no limit, also below."
)
@_seconds("--timeout-request-head", Timeouts.head, "Time from the first byte of a request to the end of its headers.")
@_seconds("--timeout-request-body", Timeouts.body, "Time a visitor may pause within a request body.")
@_seconds(
    "--timeout-write", TunnelConfig.write_timeout, "Time a visitor may read nothing of an answer that waits for it."
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

    The access key comes from SMALLWARE_KEY or --key-file. Without an account: tunnel-asgi main:app --local
    """
    _open_missing_streams()
    if _is_given(context, "key"):
        click.secho(
            "Warning: --key shows in the process list; set SMALLWARE_KEY or use --key-file instead.",
            err=True,
            fg="yellow",
        )
    if options["log_config"] is None:
        options["log_config"] = _log_config()
    options["headers"] = [_header(text) for text in options["headers"]]
    for name in ("reload_dirs", "reload_includes", "reload_excludes"):
        options[name] = list(options[name]) or None
    try:
        _check_app(options["app"])
        _settle_local(context, options)
        run(**options)
    except TunnelError as error:
        _fail(error)
    except Exception as error:
        if not failed_while_loading(error):
            raise
        print_app_frames(error)
        sys.exit(STARTUP_FAILURE)


def _is_given(context: click.Context, name: str) -> bool:
    """Whether the option stands on the command line itself."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def _check_app(text: str) -> None:
    """Only its form, for those who give a file, or forget half of the name."""
    module, _, attribute = text.partition(":")
    is_path = "/" in module or module.startswith(".") or module.endswith(".py")
    if module and attribute and not is_path:
        return
    path = PurePath(module)
    remedy = f"{path.name.removesuffix('.py').strip('.') or 'main'}:{attribute or 'app'}"
    if path.parent.name:
        remedy += f" --app-dir {path.parent}"
    raise AppLoadFailed(f"{text!r} does not name an app: expected module:attribute, such as {remedy}")


def _settle_local(context: click.Context, options: dict[str, Any]) -> None:
    """What the environment says about the one kind of tunnel does not stand in the way of the other."""
    if options["local"]:
        for name in ("domain", "server_url"):
            options[name] = options[name] if _is_given(context, name) else None
        return
    for name, reason in ONLY_LOCAL.items():
        if _is_given(context, name):
            raise ConfigError(f"--{name} goes with --local: {reason}. Add --local, or leave out --{name}")
    options["tls"] = False


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    value = value.strip()
    if not colon or not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
        raise click.BadParameter(f"{text!r} is not of the form Name:Value", param_hint="--header")
    return name, value
