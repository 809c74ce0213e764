"""The options of ``runtunnel``: from the command line, then the setting ``TUNNEL_ASGI``, then the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from tunnel_asgi.config import DEFAULT_SERVER_URL, TunnelConfig
from tunnel_asgi.errors import ConfigError
from tunnel_asgi.guard import Timeouts
from tunnel_asgi.pool import STANDBY

__all__ = ["OPTIONS", "Option", "settle"]


@dataclass(frozen=True)
class Option:
    """One option, of the same name for ``tunnel_asgi.Config`` and in the setting ``TUNNEL_ASGI``."""

    type: type
    help: str
    flag: str = ""
    """On the command line, if not ``--`` and the name."""


OPTIONS: Mapping[str, Option] = {
    "domain": Option(str, "Public name, such as www-blog-acme.e0.smallware.io; also SMALLWARE_DOMAIN."),
    "key": Option(str, "Access key; everybody on this machine can read it here: rather set SMALLWARE_KEY."),
    "key_file": Option(Path, "File that holds the access key."),
    "key_id": Option(str, "Makes the whole key the secret of this id; also SMALLWARE_KEY_ID."),
    "server_url": Option(str, f"Another tunnel server than {DEFAULT_SERVER_URL}; also SMALLWARE_SERVER.", "--server"),
    "trust_ca": Option(Path, "PEM file with a CA to trust in addition to the system's; also SMALLWARE_TRUST_CA."),
    "allow_insecure_server": Option(bool, "Allow ws:// to another machine. The token travels in clear."),
    "public_url": Option(str, "What visitors open, if it is not https://DOMAIN."),
    "local": Option(bool, "No account: an embedded relay on loopback serves visitors."),
    "port": Option(int, "With --local: port; 0 for any free one (8000)."),
    "tls": Option(bool, "With --local: https, with a development CA made on the spot."),
    "standby": Option(int, f"WebSockets that wait when nobody is connected ({STANDBY})."),
    "timeout_first_byte": Option(
        float, f"Seconds a visitor may take to begin a request ({Timeouts.first_byte:g}). 0: no limit, also below."
    ),
    "timeout_request_head": Option(float, f"Seconds from there to the end of its headers ({Timeouts.head:g})."),
    "timeout_request_body": Option(float, f"Seconds a visitor may pause within a request body ({Timeouts.body:g})."),
    "timeout_write": Option(
        float, f"Seconds a visitor may read nothing of an answer ({TunnelConfig.write_timeout:g})."
    ),
    "limit_body": Option(int, "Bytes a request body may have; a larger one is answered 413."),
}


def settle(given: Mapping[str, Any], setting: object) -> dict[str, Any]:
    """What ``tunnel_asgi.Config`` is to be told. ``given`` is the command line: None is what it does not say.

    The environment is not looked at: ``Config`` takes from there what nobody says here.

    Raises:
        ConfigError: ``setting``, the value of ``TUNNEL_ASGI``, is out of form, or options exclude each other.
    """
    line = {name: given[name] for name in OPTIONS if given.get(name) is not None}
    options = {**_fitting(_checked(setting), line), **line}
    if options.get("local"):
        return options
    for name in ("port", "tls"):
        if name in line:
            raise ConfigError(f"--{name} goes with --local: add that, or leave out --{name}")
    return _without(options, "port", "tls")


def _checked(setting: object) -> Mapping[str, Any]:
    if not isinstance(setting, Mapping):
        raise ConfigError(f"the setting TUNNEL_ASGI must be a dict, not of type {type(setting).__name__}")
    for name, value in setting.items():
        if name not in OPTIONS:
            raise ConfigError(f"the setting TUNNEL_ASGI has no option {name!r}; there are {', '.join(OPTIONS)}")
        if value is not None and not _fits(value, OPTIONS[name].type):
            wanted = OPTIONS[name].type.__name__
            raise ConfigError(f"TUNNEL_ASGI[{name!r}] must be of type {wanted}, not {type(value).__name__}")
    return setting


def _fits(value: object, wanted: type) -> bool:
    if isinstance(value, bool):
        return wanted is bool
    alike: dict[type, tuple[type, ...]] = {float: (float, int), Path: (str, PathLike)}
    return isinstance(value, alike.get(wanted, (wanted,)))


def _fitting(setting: Mapping[str, Any], line: Mapping[str, Any]) -> dict[str, Any]:
    """The part of the setting that does not contradict the command line."""
    setting = {name: value for name, value in setting.items() if value is not None}
    if line.get("local"):
        setting = _without(setting, "domain", "server_url", "public_url")
    elif "domain" in line or "server_url" in line:
        setting = _without(setting, "local")
    if "key_file" in line:  # it is nearer, though Config would prefer a key
        setting = _without(setting, "key")
    return setting


def _without(options: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}
