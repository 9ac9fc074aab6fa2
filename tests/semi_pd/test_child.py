"""Child processes: how they start, and that each of their ends is a clean one."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from jpd.child import spawn
from tests.processes import PATIENCE_S, open_files, wait_for_end

ECHO = "tests.semi_pd.echo_child"


@pytest.fixture
def child():
    child = spawn(ECHO)
    ask(child, ("variable", "PATH"))  # it is ready
    yield child
    child.kill()


def ask(child, question):
    child.connection.send(question)
    return child.connection.recv()


def test_it_ends_when_its_connection_does(child):
    child.connection.close()
    assert child.wait(PATIENCE_S) == 0


def test_it_ends_when_its_parent_hangs_up_and_what_it_said_is_there(child):
    child.connection.send(("say", "goodbye"))
    child.hang_up()
    assert child.wait(PATIENCE_S) == 0
    assert child.connection.recv() == "goodbye"


def test_killed_it_is_gone_and_the_connection_closed(child):
    child.kill()
    child.kill()
    assert child.wait() == -signal.SIGKILL
    assert child.connection.closed


def test_the_parent_sees_the_end_of_a_killed_child(child):
    os.kill(child.process.pid, signal.SIGKILL)
    assert child.connection.poll(PATIENCE_S)
    with pytest.raises(EOFError):
        child.connection.recv()


def test_a_child_that_still_runs_times_out(child):
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.01)


def test_its_exit_code(child):
    child.connection.send(("exit", 3))
    assert child.wait(PATIENCE_S) == 3


def test_an_interrupt_is_not_its_business(child):
    os.kill(child.process.pid, signal.SIGINT)
    assert ask(child, ("variable", "HOME")) == os.environ.get("HOME")
    # Nor does the terminal's reach it, not even before it can ignore it.
    assert os.getpgid(child.process.pid) != os.getpgid(0)


def test_files_and_variables_arrive(monkeypatch):
    monkeypatch.setenv("INHERITED", "yes")
    reading, writing = os.pipe()
    os.write(writing, b"hello")
    child = spawn(ECHO, fds=[reading], env={"GIVEN": "too"})
    try:
        assert ask(child, ("read", reading)) == b"hello"
        assert ask(child, ("variable", "INHERITED")) == "yes"
        assert ask(child, ("variable", "GIVEN")) == "too"
        assert ask(child, ("variable", "XLA_PYTHON_CLIENT_PREALLOCATE")) == "false"
    finally:
        child.kill()
        os.close(reading)
        os.close(writing)


def test_it_finds_modules_where_the_parent_does(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    child = spawn(ECHO)
    try:
        path = ask(child, "path")
    finally:
        child.kill()
    assert path == list(dict.fromkeys(entry or os.getcwd() for entry in sys.path))


def test_what_it_prints_goes_to_stderr(capfd):
    child = spawn(ECHO)
    ask(child, "print")
    child.kill()
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "printed by the child\n"


def test_a_module_that_is_not_there(capfd):
    child = spawn("tests.semi_pd.no_such_module")
    with pytest.raises(EOFError):
        child.connection.recv()
    assert child.wait(PATIENCE_S) == 1
    child.connection.close()
    assert "no_such_module" in capfd.readouterr().err


def test_it_outlives_the_thread_that_started_it():
    started = []

    def start():
        started.append(spawn(ECHO))
        ask(started[0], ("variable", "GIVEN"))

    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    (child,) = started
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.2)
        assert ask(child, ("variable", "GIVEN")) is None
    finally:
        child.kill()


def test_a_killed_parent_takes_its_children_along(child):
    grandchild = ask(child, "spawn")
    os.kill(child.process.pid, signal.SIGKILL)
    wait_for_end(grandchild)


def test_a_stopped_child_dies_with_its_parent(child):
    # It cannot see the end of its connection: the kernel has to end it.
    grandchild = ask(child, "spawn")
    os.kill(grandchild, signal.SIGSTOP)
    os.kill(child.process.pid, signal.SIGKILL)
    wait_for_end(grandchild)


def test_nothing_is_left_open():
    spawn(ECHO).kill()
    before = open_files()
    threads = set(threading.enumerate())
    for _ in range(3):
        spawn(ECHO).kill()
    assert open_files() - before == set()
    for thread in set(threading.enumerate()) - threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
