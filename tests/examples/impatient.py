"""A proxy with one place for a standing stream, which looks for its client every half second."""

import atexit

from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy import ProxyOptions, StreamableProxy
from mcp_proxy.servers import demo_server

mcp = StreamableProxy(
    demo_server(), options=ProxyOptions(threads=16, max_streams=1, keepalive_interval=0.5)
)
app = DispatcherMiddleware(NotFound(), {"/mcp": mcp})
atexit.register(mcp.close)
