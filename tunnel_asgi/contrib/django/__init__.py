"""A Django app with the command ``runtunnel``: runserver's habits, and a public URL.

Add ``"tunnel_asgi.contrib.django"`` to ``INSTALLED_APPS``, then ``manage.py runtunnel --domain NAME`` or ``--local``.
"""
