"""Whether the address of `bind` can be listened at, as `check` finds out; nothing of it stays."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from mcp_proxy.config import from_values
from mcp_proxy.server.binding import require_another, wait_for_ports
from mcp_proxy.server.check import check
from tests.support.front import SCRIPTED

Printed = pytest.CaptureFixture[str]

# An address of documentation (RFC 5737), which no machine has.
_NOT_OURS = "192.0.2.1:8080"


def checked(printed: Printed, bind: str) -> tuple[int, list[str]]:
    """The exit code, and the lines about the addresses."""
    code = check(from_values({"bind": bind, "command": list(SCRIPTED)}))
    lines = printed.readouterr().out.splitlines()
    return code, [line for line in lines if line[6:].startswith("bind")]


def test_a_start_at_a_port_in_use_ends_with_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-m", "mcp_proxy", "--bind", address],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    (_, said) = done.stderr.splitlines()  # the first one is gunicorn's, which is starting
    assert said == f"mcp-wsgi-proxy: {address} is in use: a second one cannot listen there"


@pytest.mark.parametrize(
    ("bind", "admin"),
    [("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1"), ("", "")],
)
def test_operators_need_an_address_of_their_own(bind: str, admin: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port = found.getsockname()[1]
    addresses = ["--bind", f"{bind}:{port}", "--admin-bind", f"{admin}:{port}"]
    done = subprocess.run(
        [sys.executable, "-m", "mcp_proxy", *addresses, "--", *SCRIPTED],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"mcp-wsgi-proxy: admin_bind: {admin}:{port} is where bind has everybody come in: "
        "choose another port"
    )


@pytest.mark.parametrize(
    ("admin", "address"),
    [
        ("127.0.0.1:9000", ("127.0.0.1", 9001)),
        ("127.0.0.1:9000", ("127.0.0.2", 9000)),
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("127.0.0.1:9000", "/run/socket"),
    ],
)
def test_addresses_that_both_can_have(admin: str, address: object) -> None:
    require_another(admin, [address])


def test_a_start_waits_for_who_is_about_to_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = taken.getsockname()
        closing = threading.Timer(0.3, taken.close)
        closing.start()
        wait_for_ports([address])
        closing.join()
    socket.create_server(address).close()


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "localhost:0", ":0", "tcp://127.0.0.1:0"])
def test_an_address_of_this_machine_is_in_order(capsys: Printed, bind: str) -> None:
    code, (line,) = checked(capsys, bind)
    assert (code, line.startswith("ok")) == (0, True), line


def test_each_of_several_addresses_has_a_line(capsys: Printed) -> None:
    code, lines = checked(capsys, f"127.0.0.1:0, {_NOT_OURS}")
    assert code == 1
    assert [line[:4] for line in lines] == ["ok  ", "FAIL", "WARN"]
    assert "this machine does not have the address 192.0.2.1" in lines[1]
    assert "nobody is asked who they are" in lines[2]


def test_a_name_that_nobody_knows_fails(capsys: Printed) -> None:
    code, (line, _) = checked(capsys, "no-such-host.invalid:8080")  # and nobody is asked who
    assert code == 1
    assert line.startswith("FAIL")
    assert "no-such-host.invalid" in line


def test_a_port_in_use_is_a_warning(capsys: Printed) -> None:
    """A copy of the service that runs is the usual reason."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        bind = f"127.0.0.1:{other.getsockname()[1]}"
        code, (line,) = checked(capsys, bind)
        assert code == 0
        assert line.startswith("WARN")
        assert f"{bind} is in use" in line


def test_a_port_that_was_tried_is_free_at_once(capsys: Printed) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
    assert checked(capsys, f"127.0.0.1:{port}")[0] == 0
    with socket.create_server(("127.0.0.1", port)) as again:
        assert again.getsockname()[1] == port


def test_a_unix_socket_is_tried_and_nothing_is_left(capsys: Printed, tmp_path: Path) -> None:
    code, (line,) = checked(capsys, f"unix:{tmp_path}/s.sock")
    assert (code, line.startswith("ok")) == (0, True), line
    assert not list(tmp_path.iterdir())


def test_a_unix_socket_whose_directory_is_missing_fails(capsys: Printed, tmp_path: Path) -> None:
    code, (line,) = checked(capsys, f"unix:{tmp_path}/none/s.sock")
    assert code == 1
    assert f"the directory {tmp_path}/none does not exist" in line


def test_a_file_that_is_no_socket_stays_and_fails(capsys: Printed, tmp_path: Path) -> None:
    file = tmp_path / "s.sock"
    file.write_text("mine")
    code, (line,) = checked(capsys, f"unix:{file}")
    assert code == 1
    assert "is there and is no socket" in line
    assert file.read_text() == "mine"


@pytest.mark.parametrize(("is_served", "mark"), [(True, "WARN"), (False, "ok  ")])
def test_a_unix_socket_that_is_there_stays(
    capsys: Printed, tmp_path: Path, is_served: bool, mark: str
) -> None:
    """gunicorn would replace it, whether or not somebody serves there."""
    path = f"{tmp_path}/s.sock"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        before = os.stat(path).st_ino
        if is_served:
            other.listen()
        code, (line,) = checked(capsys, f"unix:{path}")
        assert (code, line[:4]) == (0, mark), line
        assert os.stat(path).st_ino == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["s.sock"]


def test_a_path_that_is_too_long_fails(capsys: Printed) -> None:
    code, (line,) = checked(capsys, f"unix:/tmp/{'x' * 120}")
    assert code == 1
    assert "too long" in line


# As a user without rights; whoever is none can become none.
_AS_NOBODY = """
import os, sys
from mcp_proxy.server.binding import Unbindable, try_address
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    print(try_address(sys.argv[1]))
except Unbindable as error:
    print(error)
"""

_FIRST_FREE_PORT = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")


def found_by_nobody(bind: str) -> str:
    """What a user without rights is told of an address."""
    done = subprocess.run(
        [sys.executable, "-c", _AS_NOBODY, bind],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def test_a_directory_that_is_not_writable_is_told() -> None:
    reason = "this user may not make files in /"
    assert found_by_nobody("unix:/s.sock") == f"unix:/s.sock: {reason}"


def test_a_port_that_needs_rights_is_told() -> None:
    """Unless the machine gives every port to everybody, as many containers do."""
    found = found_by_nobody("127.0.0.1:1")
    if int(_FIRST_FREE_PORT.read_text(encoding="ascii")) > 1:
        reason = "a port below 1024 needs root or CAP_NET_BIND_SERVICE"
        assert found == f"127.0.0.1:1: {reason}"
    else:
        assert found == "127.0.0.1:1"
