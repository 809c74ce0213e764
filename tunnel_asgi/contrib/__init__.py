"""What fits tunnel-asgi to one framework. Only here frameworks are imported."""
