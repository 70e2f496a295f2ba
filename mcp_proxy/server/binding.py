"""Whether this process could listen at an address of `bind`, as gunicorn reads it.

What is bound to find out is closed at once. A unix socket that is there, which gunicorn would
replace, is left as it is: a socket of another name is bound beside it, and removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterable

from gunicorn.util import is_ipv6, parse_address

from mcp_proxy.errors import ConfigError

# What a connection to a unix socket answers at once where somebody listens, maybe not quickly.
_LISTENED_AT = (0, errno.EAGAIN, errno.EINPROGRESS)

_UNPRIVILEGED = 1024

# Hosts by which a port of every address of the machine is taken.
_EVERYWHERE = frozenset({"", "0.0.0.0", "::"})

# Seconds for which a port may be in use when this is started, and between looks.
_LONGEST_WAIT = 5.0
_POLL = 0.1

# Characters of a name at random that nothing else has.
_SHORTEST = 8


class Unbindable(ConfigError):
    """Nobody could listen there; the sentence says why."""


class InUse(Unbindable):
    """Somebody listens there, maybe the very service that is being checked."""


def wait_for_ports(addresses: Iterable[object]) -> None:
    """Returns when this process could listen at each host and port of gunicorn's addresses.

    Raises Unbindable where it cannot, or where somebody listens there for some seconds more: who
    did may be about to end, as where a service restarts. Unix sockets are gunicorn's to replace.
    """
    until = time.monotonic() + _LONGEST_WAIT
    for address in addresses:
        if not isinstance(address, tuple):
            continue
        host, port = address[:2]
        text = f"[{host}]:{port}" if is_ipv6(host) else f"{host}:{port}"
        while True:
            try:
                _try_port(text, host, port)
                break
            except InUse:
                if time.monotonic() > until:
                    raise
            time.sleep(_POLL)


def require_another(admin: str, addresses: Iterable[object]) -> None:
    """Raises ConfigError where the address for operators is one of gunicorn's, or within one."""
    host, port = parse_address(admin)
    for address in addresses:
        if not isinstance(address, tuple) or address[1] != port or port == 0:
            continue
        if address[0] == host or not _EVERYWHERE.isdisjoint((address[0], host)):
            raise ConfigError(
                f"admin_bind: {admin} is where bind has everybody come in: choose another port"
            )


def try_address(text: str) -> str:
    """What was found at one address, in words; raises Unbindable."""
    address = parse_address(text)
    if isinstance(address, int):
        return f"{text}, a descriptor of whoever starts gunicorn"
    if isinstance(address, str):
        return _try_path(address)
    _try_port(text, *address)
    return text


def _try_port(text: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if is_ipv6(host) else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((host, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InUse(f"{text} is in use: a second one cannot listen there") from error
        reason = error.strerror
        if error.errno == errno.EADDRNOTAVAIL:
            reason = f"this machine does not have the address {host}"
        elif isinstance(error, PermissionError) and port < _UNPRIVILEGED:
            reason = f"a port below {_UNPRIVILEGED} needs root or CAP_NET_BIND_SERVICE"
        raise Unbindable(f"{text}: {reason}") from error


def _try_path(path: str) -> str:
    directory, name = os.path.split(path)
    directory = directory or "."
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            client.setblocking(False)
            is_served = client.connect_ex(path) in _LISTENED_AT
    except OSError as error:  # "AF_UNIX path too long", which has no number
        raise Unbindable(f"unix:{path}: {error.strerror or error}") from error
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise Unbindable(f"unix:{path} is there and is no socket")
    _try_directory(path, directory, len(name))
    if is_served:
        raise InUse(f"unix:{path} is in use: a start takes the place of what listens there")
    return f"unix:{path}"


def _try_directory(path: str, directory: str, length: int) -> None:
    """Binds a socket beside the path, of a name that is about as long, and removes it."""
    trial_path = os.path.join(directory, secrets.token_hex(8)[: max(_SHORTEST, length)])
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
            trial.bind(trial_path)
            os.unlink(trial_path)
    except OSError as error:
        reason = error.strerror
        if isinstance(error, PermissionError):
            reason = f"this user may not make files in {directory}"
        elif not os.path.isdir(directory):
            reason = f"the directory {directory} does not exist"
        raise Unbindable(f"unix:{path}: {reason}") from error
