"""When keys were last used, as all workers of a machine note it."""

from __future__ import annotations

import os

from mcp_proxy.auth.keys import digest_of
from mcp_proxy.last_uses import LastUses, last_use_of


def test_the_last_use_of_a_key_is_known_to_the_minute() -> None:
    uses = LastUses()
    a, b, c = map(digest_of, "abc")
    uses.note(a, 6_000.0)
    uses.note(b, 6_060.0)
    uses.note(a, 6_179.9)
    assert last_use_of(a, uses.read()) == 6_120.0
    assert last_use_of(b, uses.read()) == 6_060.0
    assert last_use_of(c, uses.read()) is None


def test_processes_that_are_forked_note_for_all() -> None:
    uses = LastUses()
    digest = digest_of("a")
    pid = os.fork()
    if pid == 0:
        uses.note(digest, 6_000.0)
        os._exit(0)
    os.waitpid(pid, 0)
    assert last_use_of(digest, uses.read()) == 6_000.0


def test_where_there_is_no_room_the_key_that_was_not_used_for_longest_is_forgotten() -> None:
    uses = LastUses()
    # All of these have the same rows.
    digests = [f"{number:04x}" + "0" * 60 for number in range(1, 10)]
    for at, digest in enumerate(digests):
        uses.note(digest, 6_000.0 + 60 * at)
    known = uses.read()
    assert last_use_of(digests[0], known) is None
    assert [last_use_of(each, known) for each in digests[1:]] == [
        6_000.0 + 60 * at for at in range(1, 9)
    ]
