"""uvicorn's own test suite, with the tunnel in place of the port: a pytest plugin (``plugin.py`` is the door).

Where a test starts a server, ``server.py`` puts a ``tunnel_asgi.Server`` with a relay on the port the test visits.
Where a test drives an HTTP protocol on a mock of a transport, ``memory.py`` gives it a real ``TunnelTransport``.
``deselected.py`` lists what cannot hold, with a reason each.
"""
