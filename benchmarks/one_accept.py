"""Forward visitors the way the published client does: one ``accept()`` is pending, so one WebSocket waits.

python -m benchmarks.one_accept DOMAIN PORT SERVER_URL
"""

from __future__ import annotations

import asyncio
import logging
import sys

import tunnel_asgi


async def main(domain: str, port: str, server_url: str) -> None:
    """Forward until killed."""
    config = tunnel_asgi.TunnelConfig.from_env(domain=domain, server_url=server_url)
    async with tunnel_asgi.TunnelListener(config) as listener, asyncio.TaskGroup() as visits:
        logging.warning("Forwarding")
        async for reader, writer in listener:
            visits.create_task(tunnel_asgi.forward_tunnel_tcp(reader, writer, "127.0.0.1", int(port)))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
