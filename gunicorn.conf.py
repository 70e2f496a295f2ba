"""gunicorn reads this file by its name; installed it is `python:mcp_proxy.gunicorn_conf`.

gunicorn takes the module's globals for its settings.
"""

from mcp_proxy.server.gunicorn import settings_of_environment

globals().update(settings_of_environment())
