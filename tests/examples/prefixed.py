"""The example that PREFIXED names (`module:application`), below /tools."""

import importlib
import os

from werkzeug.exceptions import NotFound
from werkzeug.middleware.dispatcher import DispatcherMiddleware

_name, _, _attribute = os.environ["PREFIXED"].partition(":")
_module = importlib.import_module(_name)

mcp = _module.mcp
app = DispatcherMiddleware(NotFound(), {"/tools": getattr(_module, _attribute)})
