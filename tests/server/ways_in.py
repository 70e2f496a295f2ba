"""Gunicorns with our worker class, and how their clients reach them: plain, or by TLS."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.server.test_worker import WORKER, Held, serving
from tests.support.tls import Certificates

IMPATIENT = ("-m", "gunicorn", "-c", "python:tests.live.impatient_gunicorn", "-k", WORKER)


@contextmanager
def impatient(tmp_path: Path, *options: str) -> Iterator[Held]:
    """A gunicorn that waits two seconds for its clients."""
    with serving(tmp_path, *options, way=IMPATIENT) as held:
        yield held


class WayIn:
    """Starts gunicorns with these options, whose clients speak TLS where `tls` is given."""

    def __init__(
        self, tmp_path: Path, options: tuple[str, ...] = (), tls: ssl.SSLContext | None = None
    ) -> None:
        self._tmp_path = tmp_path
        self.options = options
        self.tls = tls

    @contextmanager
    def serving(self, *options: str) -> Iterator[Held]:
        """As `serving` in the tests of the worker."""
        with serving(self._tmp_path, *self.options, *options) as held:
            held.tls = self.tls
            yield held

    @contextmanager
    def impatient(self, *options: str) -> Iterator[Held]:
        """One that waits two seconds for its clients."""
        with impatient(self._tmp_path, *self.options, *options) as held:
            held.tls = self.tls
            yield held


def with_certificate(certificates: Certificates) -> tuple[str, ...]:
    """The options of a gunicorn that has a certificate."""
    return (
        *("--certfile", certificates.path("server.pem")),
        *("--keyfile", certificates.path("server.key")),
    )


def speaking_tls(certificates: Certificates, *, known: bool = True) -> ssl.SSLContext:
    """What a client speaks TLS with; it may not know the server's authority."""
    context = ssl.create_default_context()
    context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default from Python 3.13 on
    if known:
        context.load_verify_locations(certificates.path("ca.pem"))
    return context
