"""``python -m benchmarks.smallware_tunnel``: the command, whatever the folder it was installed to."""

from tunnel_asgi.forward_cli import smallware_tunnel

if __name__ == "__main__":
    smallware_tunnel()
