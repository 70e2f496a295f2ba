"""What a browser is shown at the root: what this is, and where the endpoints are.

For people on this machine alone, as the status page at the main address is: elsewhere there is
nothing at the root.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

from mcp_proxy.edge.guard import is_local
from mcp_proxy.edge.reply import Reply

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_HTML = "text/html"

_STYLE = """
:root { color-scheme: light dark; --line: #dcdfe3; --faint: #60666c; }
@media (prefers-color-scheme: dark) { :root { --line: #33383e; --faint: #9aa1a9; } }
body { margin: 0 auto; padding: 2rem 1.5rem; max-width: 44rem; }
body { font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0 0 .5rem; }
p { color: var(--faint); }
dt { margin-top: 1rem; padding-top: 1rem; border-top: 1px solid var(--line); font-weight: 600; }
dd { margin: .2rem 0 0; font-family: ui-monospace, monospace; font-size: .9em; }
"""

_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()


def is_for_browser(environ: WSGIEnvironment) -> bool:
    """Whether a request is that of a browser on this machine which opens a page."""
    if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
        return False
    return _HTML in environ.get("HTTP_ACCEPT", "") and is_local(environ)


def front_page(mount: str, paths: Mapping[str, Sequence[str]]) -> Reply:
    """The page; `paths` has those of the endpoints of each server, below `mount`."""
    rows = "".join(
        f"<dt>{escape(name)}</dt>" + "".join(f"<dd>{escape(mount + path)}</dd>" for path in found)
        for name, found in paths.items()
    )
    document = (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>mcp-wsgi-proxy</title><style>{_STYLE}</style></head><body>"
        "<h1>mcp-wsgi-proxy</h1>"
        "<p>This serves MCP servers over HTTP. Give one of these URLs to an MCP client; "
        "a browser has nothing to see there.</p>"
        f"<dl>{rows}<dt>health</dt><dd>{escape(mount)}/readyz</dd></dl></body></html>"
    ).encode()
    policy = (
        f"default-src 'none'; style-src 'sha256-{_DIGEST}'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    headers = [
        ("Content-Type", f"{_HTML}; charset=utf-8"),
        ("Content-Length", str(len(document))),
        ("Content-Security-Policy", policy),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
    ]
    return Reply(200, headers, document)
