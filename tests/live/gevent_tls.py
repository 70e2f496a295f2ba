"""A transparent proxy whose HTTPS target has a certificate by an authority of a test's.

`gunicorn -k gevent tests.live.gevent_tls:app`; GEVENT_TLS_TARGET is the URL, GEVENT_TLS_CA the file
of the authority.
"""

import os

from mcp_proxy import TransparentProxy

app = TransparentProxy(os.environ["GEVENT_TLS_TARGET"], verify=os.environ["GEVENT_TLS_CA"])
