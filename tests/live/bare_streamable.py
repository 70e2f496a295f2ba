"""A transport served on its own, as somebody with a WSGI stack would serve it.

`gunicorn tests.live.bare_streamable:app`; sessions in Redis if BARE_REDIS_URL is set.
"""

import os

from mcp_proxy import RedisStorage, StreamableProxy
from tests.support.front import SCRIPTED

_url = os.environ.get("BARE_REDIS_URL")
_storage = RedisStorage(_url, prefix=os.environ["BARE_PREFIX"], timeout=1) if _url else None

app = StreamableProxy(SCRIPTED, session_storage=_storage)
