"""A Pyramid application with an MCP endpoint at /mcp.

Run by the commands in README.md, from the directory above this one.
"""

import atexit
import os

from pyramid.config import Configurator
from pyramid.request import Request
from pyramid.response import Response
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy import ProxyOptions, StreamableProxy, TransparentProxy, demo_server

#: `threads` says what the WSGI server has, so that streams never take all of them. `allowed_hosts`
#: are the names that clients use; behind a reverse proxy, the public one.
SETTINGS = ProxyOptions(threads=16, allowed_hosts=("localhost", "127.0.0.1", "::1"))


def make_proxy() -> StreamableProxy | TransparentProxy:
    """The server that EXAMPLE_TARGET_URL or EXAMPLE_COMMAND names, else the bundled demo."""
    if target_url := os.environ.get("EXAMPLE_TARGET_URL"):
        return TransparentProxy(target_url, options=SETTINGS)
    return StreamableProxy(os.environ.get("EXAMPLE_COMMAND") or demo_server(), options=SETTINGS)


def home(request: Request) -> Response:
    """The application's own page."""
    return Response("Pyramid with an MCP server at <code>/mcp</code>")


with Configurator() as config:
    config.add_route("home", "/")
    config.add_view(home, route_name="home")

# Nothing starts here: servers, threads and connections begin with the first MCP request, in the
# process that gets it. So this module can be imported before a fork, as gunicorn --preload does.
mcp = make_proxy()
app = DispatcherMiddleware(config.make_wsgi_app(), {"/mcp": mcp})
atexit.register(mcp.close)  # ends the servers; in a process that started none it does nothing
