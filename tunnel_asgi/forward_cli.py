"""``smallware-tunnel``: forward visitors to a TCP port, with the published command's options and defaults."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from importlib.metadata import version
from typing import Any

import click
from click.core import ParameterSource

from tunnel_asgi.config import DEFAULT_SERVER_URL, TunnelConfig, read_key_file
from tunnel_asgi.errors import ConfigError, IoError, TunnelError
from tunnel_asgi.forward import address, forward_tunnel_tcp
from tunnel_asgi.listener import start_tunnel_server
from tunnel_asgi.pool import TunnelPool

__all__ = ["smallware_tunnel"]

logger: logging.Logger = logging.getLogger("tunnel_asgi")

GRACE = 10.0  # seconds for visitors in flight after the first signal
HTTP_SERVICE = "www"  # the service that visitors open with https:// (PROTOCOL.md 2)

Target = tuple[str, int]


@click.command()
@click.argument("domain")
@click.argument("target", metavar="PORT")
@click.option("--key", "-k", envvar="SMALLWARE_KEY", metavar="KEY", help="Access key. Better: SMALLWARE_KEY.")
@click.option("--key-file", type=click.Path(), metavar="FILE", help="File that holds the access key.")
@click.option("--key-id", envvar="SMALLWARE_KEY_ID", metavar="ID", help="Makes the whole key the secret of this id.")
@click.option(
    "--server",
    envvar="SMALLWARE_SERVER",
    metavar="URL",
    default=DEFAULT_SERVER_URL,
    show_default=True,
    help="Tunnel server.",
)
@click.option(
    "--trust-ca",
    envvar="SMALLWARE_TRUST_CA",
    type=click.Path(),
    metavar="FILE",
    help="PEM file with a CA to trust in addition to the system's.",
)
@click.option("--allow-insecure-server", is_flag=True, help="Allow ws:// to another machine, with the token in clear.")
@click.option("--verbose", "-v", is_flag=True, help="Log every connection in detail.")
@click.version_option(version("tunnel-asgi"), prog_name="smallware-tunnel")
@click.pass_context
def smallware_tunnel(context: click.Context, /, **options: Any) -> None:
    """Forward visitors of DOMAIN to PORT on this machine, or to HOST:PORT."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    logger.setLevel(logging.DEBUG if options["verbose"] else logging.INFO)
    if context.get_parameter_source("key") is ParameterSource.COMMANDLINE:
        logger.warning("--key shows in the process list; set SMALLWARE_KEY or use --key-file instead")
    try:
        asyncio.run(_serve(_config(options), _parse_target(options["target"])))
    except TunnelError as error:
        click.secho(f"Error: {error}", err=True, fg="red")
        sys.exit(1)


def _config(options: dict[str, Any]) -> TunnelConfig:
    key = read_key_file(options["key_file"]) if options["key_file"] else options["key"]
    return TunnelConfig(
        options["domain"],
        key=key or "",
        key_id=options["key_id"],
        server_url=options["server"],
        trust_ca=options["trust_ca"],
        allow_insecure_server=options["allow_insecure_server"],
    )


def _parse_target(text: str) -> Target:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536 or "/" in host:
        raise ConfigError(f"{text!r} is not a target: expected a port such as 8080, or HOST:PORT")
    return host.strip("[]") or "127.0.0.1", int(port)


async def _serve(config: TunnelConfig, target: Target) -> None:
    """Forward until a signal comes or the tunnel fails for good."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    visits: set[asyncio.Task[None]] = set()

    def visit(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = loop.create_task(_forward(reader, writer, target))
        visits.add(task)
        task.add_done_callback(visits.discard)

    opening = asyncio.ensure_future(start_tunnel_server(visit, config))
    if not await _first(opening, stop):
        return
    pool = opening.result()
    _announce(config, target)
    over = asyncio.ensure_future(pool.wait_over())
    try:
        if await _first(over, stop):
            over.result()
    finally:
        stop.clear()
        await _drain(pool, visits, stop)


def _announce(config: TunnelConfig, target: Target) -> None:
    domain = config.tunnel_domain
    is_public = config.server_url.rstrip("/") == DEFAULT_SERVER_URL  # what another server's visitors open, it must say
    scheme = "https://" if is_public and domain.service == HTTP_SERVICE else ""
    logger.info("Forwarding %s%s to %s (Press CTRL+C to quit)", scheme, domain, address(*target))


async def _first(work: asyncio.Future[Any], stop: asyncio.Event) -> bool:
    """Wait for the work or the signal; whether the work came first. It is cancelled otherwise."""
    stopped = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
        return work.done()
    finally:
        for future in (work, stopped):
            if not future.done():
                future.cancel()
                await asyncio.wait({future})


async def _drain(pool: TunnelPool, visits: set[asyncio.Task[None]], stop: asyncio.Event) -> None:
    """Let visitors finish, for ten seconds or until a second signal."""
    pool.close()
    if visits:
        logger.info("Waiting for %d connections to end. (Press CTRL+C again to force quit)", len(visits))
    try:
        async with asyncio.timeout(GRACE):
            await _first(asyncio.ensure_future(_until_idle(pool, visits)), stop)
    except TimeoutError:
        logger.warning("Closing %d connections that did not end in time", len(visits))
    for task in visits:
        task.cancel()
    await asyncio.gather(*visits, return_exceptions=True)
    await pool.aclose(abort=stop.is_set())


async def _until_idle(pool: TunnelPool, visits: set[asyncio.Task[None]]) -> None:
    if visits:
        await asyncio.wait(visits)
    await pool.wait_closed()


async def _forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target) -> None:
    """Serve one visitor. Whatever happens to it, the others go on."""
    connection_id = writer.get_extra_info("connection_id")
    try:
        stats = await forward_tunnel_tcp(reader, writer, *target)
    except IoError as error:
        logger.warning("[%s] %s", connection_id, error)
    except ConnectionResetError as error:
        logger.info("[%s] the visitor's connection failed: %s", connection_id, error)
    except Exception:
        logger.exception("[%s] forwarding failed", connection_id)
    else:
        logger.info(
            "[%s] ended: %d bytes downloaded, %d uploaded", connection_id, stats.bytes_downloaded, stats.bytes_uploaded
        )
