"""Becomes a program that has listening sockets from descriptor 3 on, as systemd would start it.

`python activator.py NAME=DESCRIPTOR[,...] COMMAND ARG...`; systemd's protocol wants the process id
of the program itself in LISTEN_PID, so it is set in the process that becomes it (sd_listen_fds(3)).
"""

import os
import sys

_FIRST = 3

given = [each.split("=") for each in sys.argv[1].split(",")]
for at, copy in enumerate([os.dup(int(descriptor)) for _, descriptor in given], _FIRST):
    os.dup2(copy, at)
    os.set_inheritable(at, True)
told = {
    "LISTEN_PID": str(os.getpid()),
    "LISTEN_FDS": str(len(given)),
    "LISTEN_FDNAMES": ":".join(name for name, _ in given),
}
os.execve(sys.argv[2], sys.argv[2:], {**os.environ, **told})
