"""One HTTP connection without a client library's repairs: no reconnect, no retry, pipelining."""

from __future__ import annotations

import http.client
import socket
import ssl
from email.message import Message

_PATIENCE = 20.0


class Answer:
    """A response whose body may still be to come."""

    def __init__(self, connection: Connection) -> None:
        self._file = connection.file
        self.status = int(self._file.readline().split()[1])
        self.headers: Message = http.client.parse_headers(self._file)

    def read(self) -> bytes:
        """The body; raises EOFError where it breaks off."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self._exactly(int(self.headers["Content-Length"]))
        body = b""
        while size := self._chunk_size():
            body += self._exactly(size + 2)[:-2]
        self._exactly(2)
        return body

    def _chunk_size(self) -> int:
        line = self._file.readline()
        if not line:
            raise EOFError
        return int(line, 16)

    def _exactly(self, size: int) -> bytes:
        data = self._file.read(size)
        if len(data) < size:
            raise EOFError
        return data


class Connection:
    """A kept-alive connection to a server on this machine, with TLS where there is a context."""

    def __init__(self, port: int, tls: ssl.SSLContext | None = None) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE)
        if tls is not None:
            self._socket = tls.wrap_socket(self._socket, server_hostname="127.0.0.1")
        self.file = self._socket.makefile("rb")

    def close(self) -> None:
        self.file.close()
        self._socket.close()

    def send(self, *paths: str, body: bytes = b"") -> None:
        """Sends a request for each path, all in one go."""
        head = "POST {} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {}\r\n\r\n"
        self.send_raw(b"".join(head.format(path, len(body)).encode() + body for path in paths))

    def send_raw(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read_head(self) -> Answer:
        """The next response, its body still to be read."""
        return Answer(self)

    def read(self) -> Answer:
        """The next response, its body read and forgotten."""
        answer = Answer(self)
        answer.read()
        return answer

    def ask(self, path: str, body: bytes = b"") -> Answer:
        """The response to a request."""
        self.send(path, body=body)
        return self.read()

    def is_closed_by_server(self) -> bool:
        """Whether the connection ends without another byte; waits for that."""
        try:
            return self.file.read(1) == b""
        except ConnectionResetError:
            return True
