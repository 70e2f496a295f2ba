"""A Flask application with an MCP endpoint at /mcp, in five lines."""

from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware

from mcp_proxy import StreamableProxy, demo_server

app = Flask(__name__)
mcp = StreamableProxy(demo_server())
app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/mcp": mcp})  # type: ignore[method-assign]
