"""The three answers to "how are you": alive, ready, and why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from mcp_proxy.edge.reply import Reply, json_reply

#: Says what is wrong, or None. Must answer within seconds.
Probe = Callable[[], str | None]

OK = "ok"


def alive() -> Reply:
    """/healthz: the process serves requests. Touches nothing, so nothing else can fail it."""
    return json_reply(b'{"status":"ok"}')


def ready(probes: Mapping[str, Probe]) -> Reply:
    """/readyz: 200 when every probe is content, else 503; each with its reason."""
    checks = {name: probe() or OK for name, probe in probes.items()}
    is_ready = all(outcome == OK for outcome in checks.values())
    document = {"status": "ready" if is_ready else "not ready", "checks": checks}
    return json_reply(msgspec.json.encode(document), 200 if is_ready else 503)
