"""Becomes a program that has a listening socket as descriptor 3, as systemd would start it.

`python activator.py DESCRIPTOR COMMAND ARG...`; systemd's protocol wants the process id of the
program itself in LISTEN_PID, so it is set in the process that becomes it (sd_listen_fds(3)).
"""

import os
import sys

_FIRST = 3

descriptor = int(sys.argv[1])
if descriptor != _FIRST:
    os.dup2(descriptor, _FIRST)
os.set_inheritable(_FIRST, True)
told = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
os.execve(sys.argv[2], sys.argv[2:], {**os.environ, **told})
