"""TLS for servers that have none: certificates of one's own, and a way in for TLS and plain TCP."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import select
import socket
import socketserver
import ssl
from pathlib import Path
from urllib.parse import urlencode

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.startable import ServerThread

_CHUNK = 65536
_HANDSHAKE = b"\x16"  # the first byte of a TLS connection
_PATIENCE = 10.0
_DAY = datetime.timedelta(days=1)


class Certificates:
    """A certificate authority in a directory, with one certificate for servers and one for clients.

    They are for 127.0.0.1 and `name`. Files: `ca.pem`, `server.pem`, `client.pem`, and their keys
    in `*.key`.
    """

    def __init__(self, directory: Path, name: str = "localhost") -> None:
        self._directory = directory
        self._server_name = x509.DNSName(name)
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name("Authority of this test")
        self._write("ca", self._key, self._name, is_authority=True)
        for owner in ("server", "client"):
            self._write(owner, ec.generate_private_key(ec.SECP256R1()), _name(owner))

    def path(self, name: str) -> str:
        """The path of a file."""
        return str(self._directory / name)

    @property
    def files(self) -> dict[str, str]:
        """The files of a client, as redis-py names them."""
        return {
            "ssl_ca_certs": self.path("ca.pem"),
            "ssl_certfile": self.path("client.pem"),
            "ssl_keyfile": self.path("client.key"),
        }

    @property
    def query(self) -> str:
        """The files of a client, as the query of a URL."""
        return urlencode(self.files)

    def for_anybody(self) -> ssl.SSLContext:
        """What a server speaks TLS with whose clients need no certificate."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.path("server.pem"), self.path("server.key"))
        return context

    def for_servers(self) -> ssl.SSLContext:
        """What a server speaks TLS with; clients must have a certificate too."""
        context = self.for_anybody()
        context.load_verify_locations(self.path("ca.pem"))
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _write(
        self,
        owner: str,
        key: ec.EllipticCurvePrivateKey,
        name: x509.Name,
        is_authority: bool = False,
    ) -> None:
        now = datetime.datetime.now(datetime.UTC)
        loopback = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _DAY)
            .not_valid_after(now + _DAY)
            .add_extension(_key_usage(is_authority), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), False
            )
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(
                x509.SubjectAlternativeName([loopback, self._server_name]), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )
        pem = serialization.Encoding.PEM
        private = key.private_bytes(
            pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        Path(self.path(f"{owner}.pem")).write_bytes(certificate.public_bytes(pem))
        Path(self.path(f"{owner}.key")).write_bytes(private)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_usage(is_authority: bool) -> x509.KeyUsage:
    """What VERIFY_X509_STRICT wants to be told, which is the default from Python 3.13 on."""
    return x509.KeyUsage(
        digital_signature=not is_authority,
        key_cert_sign=is_authority,
        crl_sign=is_authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


#: What gates have open in this process for others, by the names that the kernel gives to sockets.
CARRIED: set[str] = set()


class TlsGate(ServerThread):
    """Lets TLS into 127.0.0.1:`target`, and plain TCP too: servers reach each other as ever."""

    def __init__(self, target: int, certificates: Certificates) -> None:
        super().__init__(_Handler)
        self.target = target
        self.context = certificates.for_servers()
        self.encrypted = 0  # how many connections came with TLS


class _Handler(socketserver.BaseRequestHandler):
    server: TlsGate

    def handle(self) -> None:
        """Carries bytes both ways until either side ends."""
        with contextlib.suppress(OSError), self._accepted() as client:
            address = ("127.0.0.1", self.server.target)
            with socket.create_connection(address) as upstream:
                name = os.readlink(f"/proc/self/fd/{upstream.fileno()}")
                CARRIED.add(name)
                try:
                    _carry(client, upstream)
                finally:
                    CARRIED.discard(name)

    def _accepted(self) -> socket.socket:
        client: socket.socket = self.request
        client.settimeout(_PATIENCE)
        if client.recv(1, socket.MSG_PEEK) != _HANDSHAKE:
            return client
        encrypted = self.server.context.wrap_socket(client, server_side=True)
        self.server.encrypted += 1
        return encrypted


def _carry(client: socket.socket, upstream: socket.socket) -> None:
    for end in (client, upstream):
        end.setblocking(False)
    while True:
        if not (isinstance(client, ssl.SSLSocket) and client.pending()):
            select.select([client, upstream], [], [])
        for source, target in ((client, upstream), (upstream, client)):
            with contextlib.suppress(BlockingIOError, ssl.SSLWantReadError):
                data = source.recv(_CHUNK)
                if not data:
                    return
                _send(target, data)


def _send(target: socket.socket, data: bytes) -> None:
    left = memoryview(data)
    while left:
        try:
            left = left[target.send(left) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            select.select([], [target], [], _PATIENCE)
