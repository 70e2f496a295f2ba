"""gunicorn whose workers have as long as they need to write, at their end, how keys were used."""

from mcp_proxy.gunicorn_conf import *  # noqa: F403
from mcp_proxy.monitoring import endpoints

endpoints.WRITTEN = 30.0
