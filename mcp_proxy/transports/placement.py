"""Where a session's child is, as `backend_url` says it: `worker://<replica>/<child>`."""

from __future__ import annotations

from typing import NamedTuple

_SCHEME = "worker://"


class Place(NamedTuple):
    """A replica and a child of it."""

    replica: str
    child: str

    @property
    def url(self) -> str:
        """The place as a `backend_url`."""
        return f"{_SCHEME}{self.replica}/{self.child}"


def parse_place(url: str | None) -> Place | None:
    """The place that a `backend_url` names, None where it names none."""
    if url is None or not url.startswith(_SCHEME):
        return None
    replica, _, child = url.removeprefix(_SCHEME).partition("/")
    return Place(replica, child) if replica and child else None
