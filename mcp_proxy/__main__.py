"""`python -m mcp_proxy` is the command `mcp-wsgi-proxy`."""

import sys

from mcp_proxy.server.cli import main

sys.exit(main())
