"""`gunicorn mcp_proxy.wsgi:app`: the application that the environment describes."""

from mcp_proxy.app import create_app

app = create_app()
