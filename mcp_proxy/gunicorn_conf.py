"""gunicorn's configuration, from the environment: `gunicorn -c python:mcp_proxy.gunicorn_conf`.

gunicorn reads its settings from the globals of this module.
"""

from mcp_proxy.server.gunicorn import settings_of_environment

globals().update(settings_of_environment())
