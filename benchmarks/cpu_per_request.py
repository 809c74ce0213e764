"""CPU time of the serving process per small request: through the tunnel, and on a local port.

    python -m benchmarks.cpu_per_request [--requests N] [--rounds N] [--http h11] [--loop asyncio]

The contenders alternate in one run. What is measured is the CPU time the operating system charges to the serving
process (user and system), not the time on the clock; the load generator and the relay are another process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tunnel_asgi.domain import TunnelDomain
from tunnel_asgi.relay import Relay

DOMAIN = TunnelDomain.parse("www-bench-local.t00.localhost", suffix=None)
SECRET = "a secret for measurements only 0123456789"
CONNECTIONS = 16
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
TICKS = os.sysconf("SC_CLK_TCK")


async def main() -> None:
    """Measure and print the table."""
    options = parse_arguments()
    costs: dict[str, list[float]] = {"port": [], "tunnel": []}
    async with Relay(keys={DOMAIN.customer_id: {"bench": SECRET}}, domain=DOMAIN) as relay:
        common = ["--http", options.http, "--loop", options.loop, "--no-access-log"]
        tunnel = ["tunnel_asgi", *common, "--domain", str(DOMAIN), "--server", relay.server_url, "--key-id", "bench"]
        plain = ["uvicorn", *common, "--port", "0"]
        async with serving(plain) as (port_pid, port), serving(tunnel) as (tunnel_pid, _):
            contenders = {"port": (port_pid, port), "tunnel": (tunnel_pid, relay.port)}
            for round_number in range(options.rounds + 1):
                for name, (pid, visitors_port) in contenders.items():
                    cost = await measure(pid, visitors_port, options.requests)
                    if round_number:  # the first round warms up
                        costs[name].append(cost)
    report(costs, options)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=16_000, help="per contender and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--http", default="h11", choices=["h11", "httptools"])
    parser.add_argument("--loop", default="asyncio", choices=["asyncio", "uvloop"])
    return parser.parse_args()


@asynccontextmanager
async def serving(command: list[str]) -> AsyncIterator[tuple[int, int]]:
    """Run the app under a server; gives its process id, and its port if its log names one."""
    module, *arguments = command
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", module, "benchmarks.app:app", *arguments),
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"SMALLWARE_KEY": SECRET},
    )
    try:
        async with asyncio.timeout(30):
            port = await wait_until_serving(process)
        yield process.pid, port
    finally:
        process.terminate()
        await process.wait()


async def wait_until_serving(process: asyncio.subprocess.Process) -> int:
    """Read the log up to the line that says where; returns the port in it, or 0."""
    assert process.stderr is not None
    async for line in process.stderr:
        found = re.search(rb"(?:running on|Serving at) https?://[^: ]+(?::(\d+))?", line)
        if found:
            return int(found[1] or 0)
    raise SystemExit("the server ended before it served")


async def measure(pid: int, port: int, requests: int) -> float:
    """CPU microseconds of the process for one request."""
    before = cpu_seconds(pid)
    async with asyncio.TaskGroup() as group:
        for _ in range(CONNECTIONS):
            group.create_task(client(port, requests // CONNECTIONS))
    return (cpu_seconds(pid) - before) / (requests // CONNECTIONS * CONNECTIONS) * 1e6


def cpu_seconds(pid: int) -> float:
    """User and system time charged to the process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


async def client(port: int, requests: int) -> None:
    """One keep-alive connection that sends request after request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(requests):
        writer.write(REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200"), head
        assert await reader.readexactly(5) == b"hello"
    writer.close()
    await writer.wait_closed()


def report(costs: dict[str, list[float]], options: argparse.Namespace) -> None:
    """Print medians, spread and the ratio of the rounds."""
    print(f"{options.http}, {options.loop}: CPU us per request, {options.rounds} rounds of {options.requests}")
    for name, values in costs.items():
        print(f"  {name:7} median {statistics.median(values):6.1f}   {min(values):6.1f} to {max(values):6.1f}")
    ratios = [tunnel / port for port, tunnel in zip(costs["port"], costs["tunnel"], strict=True)]
    print(f"  tunnel / port: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    asyncio.run(main())
