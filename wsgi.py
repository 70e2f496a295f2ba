"""`gunicorn wsgi:app` from a checkout; an installed package has `mcp_proxy.wsgi:app`."""

from mcp_proxy.wsgi import app

__all__ = ["app"]
