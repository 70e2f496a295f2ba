"""A Django project in which MCP is a line of the settings and one of the URLs.

Both stand in one file here: `MCP_PROXY` belongs in settings.py, the other in urls.py.
"""

import os
import secrets

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.urls import include, path

from mcp_proxy import demo_server

settings.configure(
    ALLOWED_HOSTS=["localhost", "127.0.0.1", "[::1]"],
    MCP_PROXY={"command": os.environ.get("EXAMPLE_COMMAND") or demo_server().argv, "threads": 16},
    ROOT_URLCONF=__name__,
    SECRET_KEY=os.environ.get("DJANGO_SECRET_KEY") or secrets.token_urlsafe(),
)

urlpatterns = [
    path("", include("mcp_proxy.django")),
]

application = get_wsgi_application()

# What examples/gunicorn_conf.py closes when a worker is told to stop.
from mcp_proxy.django import application as mcp  # noqa: E402, F401  # after the settings
