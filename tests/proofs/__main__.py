"""The long demonstrations, loads, kills and soaks, with their figures: `scripts/prove`."""

from __future__ import annotations

import argparse
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial

from tests.proofs import (
    backends,
    both_eras,
    churn,
    clients,
    conformance,
    ended_parts,
    fuzz,
    given_connections,
    groups_eight,
    groups_hostile,
    groups_peers,
    groups_slow,
    groups_under_kills,
    homes,
    hostile,
    memory,
    metrics,
    pages,
    passing,
    questions,
    reload,
    replica_failures,
    replicas,
    sessions,
    six_servers,
    soak,
    spares,
    sse,
    sse_transparent,
    sticky,
)

PROOFS: dict[str, Callable[[], None]] = {
    "sessions-deleted": partial(sessions.opened_and_deleted, "memory"),
    "sessions-deleted-redis": partial(sessions.opened_and_deleted, "redis"),
    "sessions-abandoned": partial(sessions.opened_and_abandoned, "memory"),
    "sessions-abandoned-redis": partial(sessions.opened_and_abandoned, "redis"),
    "killed-worker": partial(sessions.killed_worker, "memory"),
    "sticky-routing": sticky.routing,
    "sticky-routing-kills": sticky.routing_kills,
    "replicas-load": replicas.load,
    "replicas-kills": replica_failures.kills,
    "replicas-kills-each": replica_failures.kills_of_each,
    "replicas-frozen": replica_failures.frozen,
    "redis-outage": replica_failures.outage,
    "sse-load": sse.load,
    "passing": given_connections.passing,
    "passing-many": partial(given_connections.many, 100_000),
    "memory": memory.memory,
    "metrics": metrics.metrics,
    "sessions-churn": churn.sessions_churn,
    "conformance-replicas": conformance.through_replicas,
    "conformance-group": conformance.of_a_group,
    "conformance-clients": conformance.of_clients,
    "sse-transparent": sse_transparent.load,
    "routing-commands": passing.routing_commands,
    "large-response": passing.large_response,
    "hostile": hostile.hostile,
    "hostile-probes": hostile.hostile_probes,
    "backends": backends.backends,
    "fuzz": fuzz.fuzz,
    "clients": clients.clients,
    "guardian-killed": ended_parts.guardian_killed,
    "arbiter-killed": ended_parts.arbiter_killed,
    "redis-emptied": ended_parts.redis_emptied,
    "threads-ended": ended_parts.threads_ended,
    "questions": questions.questions,
    "both-eras": both_eras.both_eras,
    "homes": homes.homes,
    "spares": spares.spares,
    "reload": reload.reload,
    "six-servers": partial(six_servers.six_servers, "memory"),
    "six-servers-redis": partial(six_servers.six_servers, "redis"),
    "pages": pages.pages,
    "soak": soak.soak,
    "groups-eight": groups_eight.groups_eight,
    "groups-hostile": groups_hostile.groups_hostile,
    "groups-peers": groups_peers.groups_peers,
    "groups-slow": groups_slow.groups_slow,
    "groups-same": groups_under_kills.groups_same,
    "groups-many": groups_under_kills.groups_many,
}


def main() -> int:
    """Runs the proofs that were named, or all; 1 if one of them fails. SIGTERM ends all of it."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    parser = argparse.ArgumentParser("scripts/prove", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(PROOFS))
    lasting: dict[str, Callable[[float], None]] = {
        "replicas-load": replicas.load,
        "passing": given_connections.passing,
        "memory": memory.memory,
        "hostile": hostile.hostile,
        "hostile-probes": hostile.hostile_probes,
        "both-eras": both_eras.both_eras,
        "soak": soak.soak,
        "groups-hostile": groups_hostile.groups_hostile,
        "groups-many": groups_under_kills.groups_many,
    }
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="S",
        help=f"of {', '.join(lasting)} (each has its own)",
    )
    parser.add_argument(
        "--cases", type=int, default=fuzz.CASES, metavar="N", help="of fuzz (%(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="of fuzz (another one each time)")
    parser.add_argument(
        "--kill-every",
        type=float,
        default=60.0,
        metavar="S",
        help="seconds between two kills of groups-same (%(default)s)",
    )
    given = parser.parse_args()
    same = partial(groups_under_kills.groups_same, between_kills=given.kill_every)
    PROOFS["groups-same"] = lasting["groups-same"] = same
    PROOFS["fuzz"] = partial(fuzz.fuzz, given.cases, given.seed)
    if given.seconds is not None:
        PROOFS.update({name: partial(proof, given.seconds) for name, proof in lasting.items()})
    names = given.names or list(PROOFS)
    failed = [name for name in names if not proves(name)]
    print(f"\n{len(names) - len(failed)} proved, {len(failed)} failed: {' '.join(failed)}")
    return 1 if failed else 0


def proves(name: str) -> bool:
    """Runs one proof and prints how it went."""
    print(f"\n--- {name}", flush=True)
    started = time.monotonic()
    try:
        PROOFS[name]()
    except Exception:
        traceback.print_exc(file=sys.stdout)
        print(f"FAILED after {time.monotonic() - started:.0f} s", flush=True)
        return False
    print(f"proved in {time.monotonic() - started:.0f} s", flush=True)
    return True


if __name__ == "__main__":
    sys.exit(main())
