"""Children: started, watched, stopped in order, and never left behind."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mcp_proxy.background import Reader
from mcp_proxy.errors import BackendLost, BackendTimeout, ClientLeft, Draining, Overloaded
from mcp_proxy.processes import guardian as guarding
from mcp_proxy.processes.child import Child, describe_exit, shown
from mcp_proxy.processes.guardian import REPLICA_VARIABLE, Guardian, processes_of
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.replica import Replica
from mcp_proxy.servers import StdioServer, python
from tests.support.ended_threads import end_worker, threads_end
from tests.support.front import SCRIPTED
from tests.support.waiting import eventually


def is_alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def kill(guardian: Guardian) -> int:
    """Kills the guardian process, waits for its end and returns what was its id."""
    pid = guardian.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not is_alive(pid))
    return pid


class Spawned:
    """A child of the scripted server, its output and its end collected."""

    def __init__(self, supervisor: Supervisor, *options: str, argv: tuple[str, ...] = ()) -> None:
        self.supervisor = supervisor
        self.lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self.ends: queue.SimpleQueue[str] = queue.SimpleQueue()
        server = StdioServer("test", argv or (*SCRIPTED, *options), {"GREETING": "hello"})
        self.child: Child = supervisor.spawn(server, 1 << 20, self.ends.put)
        supervisor.read(self.child, self.lines.put)

    def send(self, method: str, **params: Any) -> None:
        message = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        self.child.write(json.dumps(message).encode(), 5)

    def ask(self, method: str, **params: Any) -> Any:
        self.send(method, **params)
        return json.loads(self.lines.get(timeout=10))["result"]

    def end(self, timeout: float = 10) -> str:
        return self.ends.get(timeout=timeout)


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    replica = Replica()
    supervisor = Supervisor(replica)
    yield supervisor
    supervisor.close()
    assert list(processes_of(replica.id)) == []


def test_lines_come_in_order_and_the_end_comes_last(supervisor: Supervisor) -> None:
    spawned = Spawned(supervisor)
    assert spawned.ask("echo", a=1) == {"a": 1}
    spawned.send("die", code=4)
    assert spawned.end() == "exit code 4"
    assert supervisor.children == 0


def test_the_environment_is_ours_the_server_s_and_not_our_settings(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCP_PROXY_REDIS_URL", "redis://:secret@nowhere")
    monkeypatch.setenv("OF_THE_USER", "yes")
    spawned = Spawned(supervisor)
    environ = spawned.ask("environment")["environ"]
    assert environ["GREETING"] == "hello"
    assert environ["OF_THE_USER"] == "yes"
    assert list(processes_of(environ[REPLICA_VARIABLE])) == [spawned.child.pid]
    assert "MCP_PROXY_REDIS_URL" not in environ


def test_children_get_the_cpus_that_were_meant_for_them() -> None:
    everything = os.sched_getaffinity(0)
    supervisor = Supervisor(Replica())
    supervisor.cpu_affinity = frozenset(everything)
    os.sched_setaffinity(0, {min(everything)})
    try:
        assert set(Spawned(supervisor).ask("environment")["cpus"]) == everything
        assert os.sched_getaffinity(0) == {min(everything)}
    finally:
        os.sched_setaffinity(0, everything)
        supervisor.close()


def test_a_command_that_cannot_be_started_says_why(supervisor: Supervisor) -> None:
    with pytest.raises(BackendLost, match="No such file or directory"):
        Spawned(supervisor, argv=("/no/such/file",))


def test_an_orderly_server_ends_with_its_input(supervisor: Supervisor) -> None:
    spawned = Spawned(supervisor)
    spawned.ask("echo")
    supervisor.stop_child(spawned.child)
    assert spawned.end() == "exit code 0"


def test_a_server_that_ignores_the_end_of_its_input_gets_term(supervisor: Supervisor) -> None:
    spawned = Spawned(supervisor, "--ignore-eof")
    spawned.ask("echo")
    supervisor.stop_child(spawned.child)
    assert spawned.end() == "signal SIGTERM"


def test_a_server_that_ignores_term_gets_killed(supervisor: Supervisor) -> None:
    spawned = Spawned(supervisor, "--ignore-eof", "--ignore-term")
    spawned.ask("echo")
    supervisor.stop_child(spawned.child)
    supervisor.stop_child(spawned.child)  # harmless
    assert spawned.end() == "signal SIGKILL"


def test_grandchildren_end_with_their_parent(supervisor: Supervisor) -> None:
    spawned = Spawned(supervisor)
    pid = spawned.ask("grandchild")["pid"]
    spawned.send("die")
    spawned.end()
    eventually(lambda: not is_alive(pid))


def test_a_grandchild_that_holds_the_output_open_does_not_hide_the_end(
    supervisor: Supervisor,
) -> None:
    spawned = Spawned(supervisor)
    pid = spawned.ask("grandchild", holds_output=True, escape=True)["pid"]
    spawned.send("die", code=5)
    assert spawned.end() == "exit code 5"
    os.kill(pid, signal.SIGKILL)


def test_a_server_that_closes_its_output_is_stopped(supervisor: Supervisor) -> None:
    spawned = Spawned(supervisor, "--ignore-eof")
    spawned.send("close_output")
    assert spawned.end() == "signal SIGTERM"


def test_close_ends_everybody_and_refuses_newcomers() -> None:
    supervisor = Supervisor(Replica())
    spawned = [Spawned(supervisor) for _ in range(3)]
    supervisor.close()
    assert [s.end(0.1) for s in spawned] == ["exit code 0"] * 3
    with pytest.raises(Draining):
        Spawned(supervisor)


def test_close_leaves_the_escaped_to_the_guardian() -> None:
    supervisor = Supervisor(Replica())
    pid = Spawned(supervisor).ask("grandchild", escape=True)["pid"]
    assert is_alive(pid)
    supervisor.close()
    assert not is_alive(pid)


def test_without_pidfd_exits_are_noticed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "pidfd_open")
    supervisor = Supervisor(Replica())
    spawned = Spawned(supervisor)
    pid = spawned.ask("grandchild", holds_output=True)["pid"]
    spawned.send("die", code=6)
    assert spawned.end() == "exit code 6"
    eventually(lambda: not is_alive(pid))
    supervisor.close()


def test_one_child_s_trouble_is_not_the_others(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(how: str) -> None:
        raise RuntimeError(how)

    server = StdioServer("test", SCRIPTED)
    child = supervisor.spawn(server, 1 << 20, explode)
    supervisor.read(child, lambda line: None)
    other = Spawned(supervisor)
    other.ask("echo")
    supervisor.stop_child(child)
    supervisor.stop_child(other.child)
    assert other.end() == "exit code 0"
    eventually(lambda: "mcp-supervisor failed at one of its tasks" in caplog.text)
    eventually(lambda: supervisor.children == 0)


def test_stderr_goes_to_the_log_and_its_end_is_kept(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    spawned = Spawned(supervisor)
    spawned.ask("complain", lines=50, length=3000)
    eventually(lambda: len(re.findall(r"\[test pid=\d+\] stderr: !!!", caplog.text)) >= 50)
    assert len(spawned.child.stderr_tail) == 20
    assert all(len(line) < 2100 for line in spawned.child.stderr_tail)


def test_a_last_line_without_a_line_break_counts(supervisor: Supervisor) -> None:
    code = "import sys; sys.stdout.write('{}'); sys.stderr.write('oh')"
    spawned = Spawned(supervisor, argv=(sys.executable, "-c", code))
    assert spawned.lines.get(timeout=10) == b"{}"
    spawned.end()
    assert spawned.child.stderr_tail == ["oh"]


def test_writing_to_a_server_that_is_gone(supervisor: Supervisor) -> None:
    spawned = Spawned(supervisor)
    spawned.send("die")
    spawned.end()
    with pytest.raises(BackendLost):
        spawned.send("echo")


def test_writing_to_a_server_that_does_not_read_times_out(supervisor: Supervisor) -> None:
    spawned = Spawned(supervisor)
    spawned.ask("stop_reading")
    with pytest.raises(BackendTimeout):
        spawned.child.write(b"x" * 1_000_000, 0.3)


def test_a_writer_whose_client_has_left_gives_up_before_it_has_written_anything(
    supervisor: Supervisor,
) -> None:
    spawned = Spawned(supervisor)
    began = time.monotonic()
    with spawned.child._write_lock, pytest.raises(ClientLeft):
        spawned.child.write(b"{}", 30, lambda: True)
    spawned.ask("stop_reading")
    with pytest.raises(BackendTimeout):  # half a message would spoil the next one
        spawned.child.write(b"x" * 1_000_000, 1.5, lambda: True)
    with pytest.raises(ClientLeft):
        spawned.child.write(b"{}", 30, lambda: True)
    assert time.monotonic() - began < 15


def test_a_writer_waits_for_the_one_before(supervisor: Supervisor) -> None:
    spawned = Spawned(supervisor)
    with spawned.child._write_lock, pytest.raises(BackendTimeout):
        spawned.child.write(b"{}", 0.1)


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit code 0"), (3, "exit code 3"), (-9, "signal SIGKILL"), (-60, "signal 60")],
)
def test_the_end_in_words(status: int, words: str) -> None:
    assert describe_exit(status) == words


def test_a_long_line_is_shown_in_part() -> None:
    assert shown(b"abc\r") == "abc"
    assert shown(b"\xff" * 3000).endswith("\ufffd [...]")


# --- the guardian --------------------------------------------------------------------------------


def test_a_guardian_that_was_killed_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    guardian = Guardian("guardian-mark")
    guardian.start()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1, start_new_session=True)
    guardian.watch(child.pid)
    kill(guardian)
    guardian.forget(1 << 22)
    assert "starting another one" in caplog.text
    guardian.close()  # the new one was told of the child
    assert child.wait(5) == -signal.SIGKILL
    assert child.stdin is not None
    child.stdin.close()
    guardian.close()


HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from mcp_proxy.processes.supervisor import Supervisor
from mcp_proxy.replica import Replica
from mcp_proxy.servers import StdioServer
supervisor = Supervisor(Replica())
server = StdioServer("x", tuple({argv!r}))
children = [supervisor.spawn(server, 1000, print) for _ in range(3)]
print(*[child.pid for child in children], flush=True)
time.sleep(600)
"""


def test_nothing_outlives_a_replica_that_was_killed() -> None:
    root = str(Path(__file__).parents[2])
    code = HOLDER.format(root=root, argv=[*SCRIPTED, "--ignore-eof", "--ignore-term"])
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    pids = [int(part) for part in holder.stdout.readline().split()]
    assert all(is_alive(pid) for pid in pids)
    holder.kill()
    holder.wait()
    holder.stdout.close()
    eventually(lambda: not any(is_alive(pid) for pid in pids), timeout=2)


@threads_end
def test_children_are_stopped_even_if_the_supervisor_s_thread_has_ended() -> None:
    supervisor = Supervisor(Replica())
    spawned = Spawned(supervisor, "--ignore-eof")
    spawned.ask("echo")
    end_worker(supervisor)
    supervisor.close()
    assert not is_alive(spawned.child.pid)


def test_a_reader_that_fails_says_so_and_ends_its_child(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(line: bytes) -> None:
        raise ValueError("not foreseen")

    ends: queue.SimpleQueue[str] = queue.SimpleQueue()
    child = supervisor.spawn(StdioServer("test", SCRIPTED), 1 << 20, ends.put)
    supervisor.read(child, fail)
    child.write(b'{"jsonrpc":"2.0","id":1,"method":"echo"}', 5)
    assert ends.get(timeout=10) == "exit code 0"
    assert "not foreseen" in caplog.text


# --- descendants that left the group -------------------------------------------------------------


@pytest.mark.parametrize("holds_output", [False, True])
def test_the_escaped_end_with_their_server(supervisor: Supervisor, holds_output: bool) -> None:
    spawned, other = Spawned(supervisor), Spawned(supervisor)
    pid = spawned.ask("grandchild", escape=True, holds_output=holds_output)["pid"]
    spared = other.ask("grandchild", escape=True)["pid"]
    supervisor.stop_child(spawned.child)
    assert spawned.end() == "exit code 0"
    eventually(lambda: not is_alive(pid))
    assert is_alive(spared)


def test_the_escaped_are_spared_where_that_is_wanted_until_the_replica_ends() -> None:
    supervisor = Supervisor(Replica())
    supervisor.keep_detached = True
    spawned = Spawned(supervisor)
    pid = spawned.ask("grandchild", escape=True, holds_output=True)["pid"]
    supervisor.stop_child(spawned.child)
    assert spawned.end() == "exit code 0"
    name = f"mcp-child-{spawned.child.pid}"
    eventually(lambda: all(thread.name != name for thread in threading.enumerate()))
    assert is_alive(pid)
    supervisor.close()
    eventually(lambda: not is_alive(pid))


# --- the guardian --------------------------------------------------------------------------------


def test_a_killed_guardian_is_replaced_at_once_with_all_that_it_knew(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarding, "SETTLED", 0.0)
    spawned = Spawned(supervisor, "--ignore-eof", "--ignore-term")
    for _ in range(2):
        first = kill(supervisor.guardian)
        eventually(lambda: supervisor.guardian.pid not in (first, None))  # noqa: B023
    supervisor.guardian.close()  # as if the replica were gone
    assert spawned.end() == "signal SIGKILL"


def test_a_guardian_that_cannot_live_is_not_started_again_and_again(
    supervisor: Supervisor, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guarding, "SETTLED", 600.0)
    spawned = Spawned(supervisor)
    first = kill(supervisor.guardian)
    eventually(lambda: supervisor.guardian.pid not in (first, None))
    assert "exits as soon as it is started" not in caplog.text
    kill(supervisor.guardian)
    eventually(lambda: "exits as soon as it is started" in caplog.text)
    supervisor.stop_child(spawned.child)  # the next announcement starts it
    assert spawned.end() == "exit code 0"
    assert supervisor.guardian.pid is not None
    assert is_alive(supervisor.guardian.pid)


def test_a_child_of_which_no_guardian_can_know_is_not_started(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica = Spawned(supervisor).ask("environment")["environ"][REPLICA_VARIABLE]

    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Guardian, "watch", fail)
        with pytest.raises(BackendLost, match="Too many open files"):
            Spawned(supervisor)
    assert supervisor.children == 1
    eventually(lambda: len(list(processes_of(replica))) == 1)


def test_a_guardian_that_could_not_be_started_is_started_with_the_next_child(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Guardian, "start", fail)
        with pytest.raises(BackendLost, match="Too many open files"):
            Spawned(supervisor)
    assert supervisor.children == 0
    spawned = Spawned(supervisor)
    spawned.send("die", code=3)
    assert spawned.end() == "exit code 3"


def test_a_child_without_a_pidfd_is_watched_otherwise(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(24, "Too many open files")

    supervisor.start()
    monkeypatch.setattr(os, "pidfd_open", fail)
    spawned = Spawned(supervisor)
    spawned.ask("grandchild", holds_output=True)
    spawned.send("die", code=6)
    assert spawned.end() == "exit code 6"


def test_where_no_thread_can_be_had_no_child_is_left(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    supervisor.start()
    monkeypatch.setattr(Reader, "start", lambda reader: throw(RuntimeError("can't start")))
    with pytest.raises(Overloaded, match="can't start"):
        Spawned(supervisor)
    eventually(lambda: supervisor.children == 0)


def throw(error: BaseException) -> None:
    raise error


# --- what children get ---------------------------------------------------------------------------


def test_a_python_server_does_not_keep_its_output_back(supervisor: Supervisor) -> None:
    program = "print('{}', end='\\n'); import time; time.sleep(600)"
    spawned = Spawned(supervisor, argv=(sys.executable, "-c", program))
    assert spawned.lines.get(timeout=10) == b"{}"


def test_what_is_set_for_a_python_server_stands(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONUNBUFFERED", "")
    environ = Spawned(supervisor).ask("environment")["environ"]
    assert environ["PYTHONUNBUFFERED"] == ""


def test_out_of_memory_a_child_is_ended_before_its_worker(supervisor: Supervisor) -> None:
    pid = Spawned(supervisor).child.pid
    ours = int(Path("/proc/self/oom_score_adj").read_text())
    assert int(Path(f"/proc/{pid}/oom_score_adj").read_text()) == min(1000, ours + 500)


def test_the_guardian_runs_where_the_executable_is_no_interpreter(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")  # as uWSGI, which names itself
    supervisor = Supervisor(Replica())
    pid = Spawned(supervisor, argv=(python(), *SCRIPTED[1:])).ask("grandchild", escape=True)["pid"]
    supervisor.close()
    eventually(lambda: not is_alive(pid))
