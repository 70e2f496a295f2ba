"""A Flask application with an MCP endpoint at /mcp.

Run by the commands in README.md, from the directory above this one.
"""

import atexit
import os

from flask import Flask
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


app = Flask(__name__)


@app.get("/")
def home() -> str:
    """The application's own page."""
    return "Flask with an MCP server at <code>/mcp</code>"


# Nothing starts here: servers, threads and connections begin with the first MCP request, in the
# process that gets it. So this module can be imported before a fork, as gunicorn --preload does.
mcp = make_proxy()
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/mcp": mcp})  # type: ignore[method-assign]
atexit.register(mcp.close)  # ends the servers; in a process that started none it does nothing
