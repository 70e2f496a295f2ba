"""The application, before which something happens to files as soon as a worker begins to import it.

Where `BROKEN_AT_IMPORT` names a directory, each file in it is written over the file of its name
beside that directory.
"""

import os
from pathlib import Path

_directory = Path(os.environ["BROKEN_AT_IMPORT"])
if _directory.exists():
    for _file in _directory.iterdir():
        (_directory.parent / _file.name).write_bytes(_file.read_bytes())

from mcp_proxy.wsgi import app  # noqa: E402, F401
