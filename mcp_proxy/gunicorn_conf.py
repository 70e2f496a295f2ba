"""gunicorn's configuration, from the environment: `gunicorn -c python:mcp_proxy.gunicorn_conf`.

gunicorn reads its settings from the globals of this module.
"""

from mcp_proxy.config import ProxyConfig
from mcp_proxy.server.gunicorn import gunicorn_settings

globals().update(gunicorn_settings(ProxyConfig.from_env()))
