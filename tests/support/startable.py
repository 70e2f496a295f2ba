"""Things that a `with` block starts, and that are gone when it is left."""

from __future__ import annotations

import socketserver
import threading
from abc import ABC, abstractmethod
from typing import Self

_POLL = 0.01


class Startable(ABC):
    """What `with` starts and in the end closes, whether or not it could be started."""

    def start(self) -> None:  # noqa: B027  # nothing is left to do where the constructor starts it
        """Starts it and waits until it can be used."""

    @abstractmethod
    def close(self) -> None:
        """Ends it, and leaves nothing behind."""

    def log(self) -> str:
        """What it wrote, for the error to show that is raised when it does not start."""
        return ""

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException as error:
            if said := self.log():
                error.add_note(said)
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ServerThread(Startable, socketserver.ThreadingTCPServer):
    """A TCP server on a port of 127.0.0.1, in a thread of this process; 0 for any port."""

    daemon_threads = True
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(self, handler: type[socketserver.BaseRequestHandler], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(_POLL,))

    @property
    def port(self) -> int:
        """The port that this listens on."""
        return int(self.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()
