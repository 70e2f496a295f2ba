"""A Django project in one file, with an MCP endpoint at /mcp beside it.

A project of the usual shape has the lines after `get_wsgi_application()` in its wsgi.py. The proxy
stands before Django, not in it: Django's middleware does not see MCP requests.
"""

import atexit
import os
import secrets

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy import ProxyOptions, StreamableProxy, TransparentProxy, demo_server

HOSTS = ("localhost", "127.0.0.1", "::1")

#: `threads` says what the WSGI server has, so that streams never take all of them. `allowed_hosts`
#: is to the proxy what ALLOWED_HOSTS is to Django, with ::1 where Django has [::1].
PROXY_SETTINGS = ProxyOptions(threads=16, allowed_hosts=HOSTS)

settings.configure(
    ALLOWED_HOSTS=["[::1]" if host == "::1" else host for host in HOSTS],
    ROOT_URLCONF=__name__,
    SECRET_KEY=os.environ.get("DJANGO_SECRET_KEY") or secrets.token_urlsafe(),
)


def home(request: HttpRequest) -> HttpResponse:
    """The project's own page."""
    return HttpResponse("Django with an MCP server at <code>/mcp</code>")


urlpatterns = [path("", home)]


def make_proxy() -> StreamableProxy | TransparentProxy:
    """The server that EXAMPLE_TARGET_URL or EXAMPLE_COMMAND names, else the bundled demo."""
    if target_url := os.environ.get("EXAMPLE_TARGET_URL"):
        return TransparentProxy(target_url, options=PROXY_SETTINGS)
    command = os.environ.get("EXAMPLE_COMMAND") or demo_server()
    return StreamableProxy(command, options=PROXY_SETTINGS)


# Nothing starts here: servers, threads and connections begin with the first MCP request, in the
# process that gets it. So this module can be imported before a fork, as gunicorn --preload does.
mcp = make_proxy()
application = DispatcherMiddleware(get_wsgi_application(), {"/mcp": mcp})
atexit.register(mcp.close)  # ends the servers; in a process that started none it does nothing
