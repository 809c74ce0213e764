"""The Autobahn WebSocket cases against an echo app: no case may end worse through the tunnel than on a port.

    python -m tests.external.autobahn [--all | --cases '1.*' '7.*'] [--quick] [--output FILE]

``kosoku`` drives Autobahn's own case files. For every parser and WebSocket implementation of uvicorn the same app is
served twice, by uvicorn on a port and by us through a relay, each in a process of its own, and the verdicts of each
case are compared. The relay must have carried every case and seen no breach of the wire protocol.

A case that ends worse is run again on both, alone. Some verdicts are races: OK is that a good message was echoed
before the bad one behind it ended the connection, NON-STRICT that it was not; and a deadline of a few seconds may
pass on a busy machine. What comes from us stays worse.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import multiprocessing
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import uvicorn
from kosoku import FailureError, run_fuzzingclient

import tunnel_asgi
from tests.support import DOMAIN, KEY_ID, KEYS, SECRET
from tunnel_asgi.relay import Relay

PARSERS = ["h11", "httptools"]
IMPLEMENTATIONS = ["websockets-sansio", "wsproto"]
START_TIMEOUT = 30.0  # seconds for a process to import and listen
CONCURRENCY = 2  # cases at once
ATTEMPTS = 5  # alone, before a case that ends worse is believed

# Compression (12 and 13) is 216 cases of a thousand messages each; kosoku gives one 20 seconds, and many need that for
# zlib alone. Two sizes of each kind will do: 64 and 1024 bytes.
COMPRESSION = [*(f"12.{data}" for data in range(1, 6)), *(f"13.{parameters}" for parameters in range(1, 8))]
SAMPLE = [f"{chapter}.*" for chapter in (1, 2, 3, 4, 5, 6, 7, 9, 10)]
SAMPLE += [f"{kind}.{size}" for kind in COMPRESSION for size in (2, 4)]

# Best first: a verdict is worse than the ones before it.
BEHAVIORS = ["OK", "INFORMATIONAL", "NON-STRICT", "UNIMPLEMENTED", "FAILED", "ERROR"]
CLOSINGS = ["OK", "INFORMATIONAL", "UNCLEAN", "WRONG CODE", "FAILED BY CLIENT", "FAILED"]

spawn = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Verdict:
    """What Autobahn says about the messages of a case, and about its closing handshake."""

    behavior: str
    closing: str

    def __str__(self) -> str:
        return f"{self.behavior} / {self.closing}"

    def is_worse_than(self, other: Verdict) -> bool:
        return BEHAVIORS.index(self.behavior) > BEHAVIORS.index(other.behavior) or CLOSINGS.index(
            self.closing
        ) > CLOSINGS.index(other.closing)


Verdicts = dict[str, Verdict]


@dataclass(frozen=True)
class Difference:
    """A case that ends differently through the tunnel."""

    case: str
    port: Verdict
    tunnel: Verdict

    @property
    def is_worse(self) -> bool:
        return self.tunnel.is_worse_than(self.port)


@dataclass
class Comparison:
    """The same cases against the same app, on a port and through the tunnel."""

    http: str
    ws: str
    port: Verdicts
    tunnel: Verdicts
    port_seconds: float
    tunnel_seconds: float
    visitors: int = 0
    violations: tuple[str, ...] = ()
    repeated: int = 0

    @property
    def differences(self) -> list[Difference]:
        return [
            Difference(case, verdict, self.tunnel[case])
            for case, verdict in self.port.items()
            if verdict != self.tunnel[case]
        ]

    @property
    def worse(self) -> list[str]:
        return [one.case for one in self.differences if one.is_worse]

    @property
    def failures(self) -> list[str]:
        found = [
            f"case {one.case}: {one.port} on the port, {one.tunnel} in the tunnel"
            for one in self.differences
            if one.is_worse
        ]
        found += [f"breach of the wire protocol: {violation}" for violation in self.violations]
        if self.visitors < len(self.tunnel):
            found.append(f"the relay carried {self.visitors} visitors for {len(self.tunnel)} cases")
        return found


# The three processes


async def echo(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Send every message back as it came."""
    assert scope["type"] == "websocket"
    await receive()
    await send({"type": "websocket.accept"})
    while (message := await receive())["type"] == "websocket.receive":
        if message.get("bytes") is not None:
            await send({"type": "websocket.send", "bytes": message["bytes"]})
        else:
            await send({"type": "websocket.send", "text": message["text"]})


def serve_on_port(http: str, ws: str, parent: Connection) -> None:
    config = uvicorn.Config(echo, http=http, ws=ws, lifespan="off", log_level="critical")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        parent.send(listener.getsockname()[1])
        uvicorn.Server(config).run(sockets=[listener])


def serve_through_tunnel(http: str, ws: str, server_url: str, public_url: str, parent: Connection) -> None:
    config = tunnel_asgi.Config(
        echo,
        domain=str(DOMAIN),
        key=SECRET,
        key_id=KEY_ID,
        server_url=server_url,
        public_url=public_url,
        http=http,
        ws=ws,
        lifespan="off",
        log_level="critical",
    )
    tunnel_asgi.Server(config, on_started=lambda: parent.send(None)).run()


def run_relay(parent: Connection) -> None:
    """Tell where the relay is; told to stop, tell what it saw."""

    async def main() -> None:
        async with Relay(keys=KEYS, domain=DOMAIN) as relay:
            parent.send((relay.server_url, relay.url, relay.port))
            await asyncio.to_thread(parent.recv)
            parent.send((relay.visitors_served, tuple(relay.violations)))

    asyncio.run(main())


@contextmanager
def process(target: Callable[..., None], *args: Any) -> Iterator[tuple[Any, Connection]]:
    """Run the target until the block ends; yields the first thing it sent, and the pipe."""
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=target, args=(*args, theirs), daemon=True)
    child.start()
    theirs.close()
    try:
        if not ours.poll(START_TIMEOUT):
            raise TimeoutError(f"{target.__name__} did not start within {START_TIMEOUT:.0f} s")
        yield ours.recv(), ours
    finally:
        child.terminate()
        child.join()


# The comparison


def run_cases(port: int, cases: Sequence[str], *, concurrency: int = CONCURRENCY) -> Verdicts:
    async def run() -> list[Any]:
        try:
            return list(await run_fuzzingclient(f"ws://127.0.0.1:{port}", cases, concurrency=concurrency))
        except FailureError as failure:
            return list(failure.results)

    results = asyncio.run(run())
    return {result.case_id: Verdict(result.behavior.value, result.behavior_close.value) for result in results}


def compare(http: str, ws: str, cases: Sequence[str]) -> Comparison:
    with (
        process(serve_on_port, http, ws) as (port, _),
        process(run_relay) as ((server_url, public_url, tunnel_port), relay),
        process(serve_through_tunnel, http, ws, server_url, public_url),
    ):
        started = time.perf_counter()
        on_port = run_cases(port, cases)
        between = time.perf_counter()
        through_tunnel = run_cases(tunnel_port, cases)
        ended = time.perf_counter()
        comparison = Comparison(http, ws, on_port, through_tunnel, between - started, ended - between)
        for _ in range(ATTEMPTS):
            for case in comparison.worse:
                comparison.repeated += 1
                on_port |= run_cases(port, [case], concurrency=1)
                through_tunnel |= run_cases(tunnel_port, [case], concurrency=1)
        relay.send(None)
        comparison.visitors, comparison.violations = relay.recv()
    return comparison


def describe(verdicts: Verdicts) -> str:
    behaviors = Counter(verdict.behavior for verdict in verdicts.values())
    closings = Counter(verdict.closing for verdict in verdicts.values())
    return " | ".join(
        ", ".join(f"{counts[name]} {name}" for name in order if counts[name])
        for counts, order in ((behaviors, BEHAVIORS), (closings, CLOSINGS))
    )


def report(comparison: Comparison) -> None:
    print(f"   port   {comparison.port_seconds:5.1f} s  {describe(comparison.port)}")
    print(f"   tunnel {comparison.tunnel_seconds:5.1f} s  {describe(comparison.tunnel)}")
    print(
        f"   {comparison.visitors} visitors at the relay, {comparison.repeated} cases run again, "
        f"{len(comparison.differences)} verdicts differ"
    )
    for one in comparison.differences:
        print(f"   {'WORSE ' if one.is_worse else 'better'} {one.case}: {one.port} -> {one.tunnel}")
    for failure in comparison.failures:
        print(f"   FAILED: {failure}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=SAMPLE, help="case ids or globs")
    parser.add_argument("--all", action="store_const", dest="cases", const=["*"], help="also all of compression: slow")
    parser.add_argument("--http", nargs="+", default=PARSERS, choices=PARSERS)
    parser.add_argument("--ws", nargs="+", default=IMPLEMENTATIONS, choices=IMPLEMENTATIONS)
    parser.add_argument("--output", type=Path, help="write every verdict as JSON")
    parser.add_argument("--quick", action="store_true", help="each parser and each implementation once, not every pair")
    options = parser.parse_args()

    pairs = (
        zip(options.http, options.ws, strict=False) if options.quick else itertools.product(options.http, options.ws)
    )
    comparisons = []
    for http, ws in pairs:
        print(f"== {http}, {ws}", flush=True)
        comparisons.append(compare(http, ws, options.cases))
        report(comparisons[-1])
    if options.output is not None:
        options.output.write_text(json.dumps([asdict(comparison) for comparison in comparisons], indent=1) + "\n")
    failed = any(comparison.failures for comparison in comparisons)
    print("FAILED" if failed else "no case ends worse through the tunnel")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
