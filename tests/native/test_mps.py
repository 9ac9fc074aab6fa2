"""The MPS daemon's life, with a stand-in for NVIDIA's programs: start, adopt, share, ask, stop."""

import dataclasses
import fcntl
import os
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import native
from native import mps, mps_checks, mps_control, mps_directory
from native.mps import Mps, MpsError, visible_sms
from tests.native import fake_mps

ROOT = Path(native.__file__).parents[1]

# A process that starts the daemon in argv[1], says so, and does nothing more.
USER = """
import sys
from pathlib import Path
from native import mps, mps_checks
mps_checks.DEVICE = mps_checks.DEFAULT_PIPE = Path(sys.argv[1]).parent / "gpu"
mps._QUERY_TIMEOUT_S = mps._START_TIMEOUT_S = mps._LOCK_TIMEOUT_S = 600.0
daemon = mps.Mps.start(Path(sys.argv[1]))
print("started", flush=True)
sys.stdin.read()
"""


class World:
    """A machine with a GPU and the stand-ins, and how these are to behave."""

    def __init__(self, folder: Path) -> None:
        self.directory = folder / "mps"
        self.pipe = self.directory / "pipe"
        self.state = folder / "state"

    def behaves(self, *lines: str) -> None:
        (self.state / "behaviour").write_text("\n".join(lines))

    def has_clients(self, *pids: int) -> None:
        (self.state / "clients").write_text(" ".join(map(str, pids)))

    @property
    def calls(self) -> list[str]:
        return (self.state / "calls").read_text().splitlines()

    @property
    def daemon_environment(self) -> dict[str, str]:
        lines = (self.state / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    @property
    def daemon_pid(self) -> int:
        return int((self.pipe / f"{mps_control.CONTROL}.pid").read_text())

    def processes(self) -> list[mps_control.MpsProcess]:
        """All daemons, servers and questions of this world, in whatever directory."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        found = [process for pid in pids if (process := mps_control.read_process(pid))]
        return [p for p in found if p.environment.get("FAKE_MPS") == str(self.state)]

    def user(self) -> subprocess.Popen[str]:
        """Another process that uses the daemon; it stops it when its standard input ends."""
        process = subprocess.Popen(
            [sys.executable, "-c", USER, str(self.directory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout.readline() == "started\n"
        return process


@pytest.fixture
def world(monkeypatch):
    # Not tmp_path: sockets' paths must be short.
    with tempfile.TemporaryDirectory(prefix="mps-") as name:
        folder = Path(name)
        for new in ("bin", "state", "none"):
            (folder / new).mkdir()
        for new in ("gpu", "state/behaviour", "state/clients", "state/calls"):
            (folder / new).touch()
        fake_mps.install(folder / "bin")
        for variable in ("CUDA_VISIBLE_DEVICES", mps_control.PIPE_VARIABLE):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("FAKE_MPS", str(folder / "state"))
        monkeypatch.setattr(mps_checks, "DEVICE", folder / "gpu")
        monkeypatch.setattr(mps_checks, "DEFAULT_PIPE", folder / "none")
        # What is to answer may have to wait for the machine.
        for name in ("_QUERY_TIMEOUT_S", "_START_TIMEOUT_S", "_LOCK_TIMEOUT_S"):
            monkeypatch.setattr(mps, name, 600.0)
        world = World(folder)
        yield world
        left = world.processes()
        mps_control.end(left, 0)
        assert not left


def test_start_and_stop(world):
    daemon = Mps.start(world.directory)
    assert world.calls[0] == "-d"
    assert daemon.directory == world.directory
    assert {p.pid for p in mps_control.processes_of(world.pipe)} > {world.daemon_pid}
    for folder in (world.directory, world.pipe, world.directory / "log"):
        assert folder.stat().st_mode & 0o777 == 0o700
    daemon.stop()
    assert world.calls[-1].startswith("quit -t")
    assert not world.processes()
    assert not world.directory.exists()
    daemon.stop()
    for use in (daemon.clients, lambda: daemon.environment(50), lambda: daemon.terminate_client(1)):
        with pytest.raises(MpsError, match="is stopped"):
            use()


def test_it_is_stopped_when_a_block_fails(world):
    with pytest.raises(ValueError, match="from 1 to 100"), Mps.start(world.directory) as daemon:
        daemon.environment(0)
    assert world.calls[0] == "-d"
    assert not world.processes()


def test_it_is_stopped_when_the_interpreter_exits(world):
    user = world.user()
    assert world.processes()
    user.communicate()
    assert user.returncode == 0
    assert not world.processes()
    assert not world.directory.exists()


def test_stop_from_several_threads(world):
    daemon = Mps.start(world.directory)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(daemon.stop) for _ in range(4)]:
            done.result()
    assert sum(call.startswith("quit") for call in world.calls) == 1
    assert not world.directory.exists()


def test_files_of_others_in_its_directory_stay(world):
    world.directory.mkdir(mode=0o700)
    (world.directory / "notes").write_text("mine")
    Mps.start(world.directory).stop()
    assert [path.name for path in world.directory.iterdir()] == ["notes"]


def test_a_directory_that_is_open_to_others_is_refused(world):
    world.directory.mkdir()
    world.directory.chmod(0o755)
    with pytest.raises(MpsError, match="mode 0700; it has mode 0755"):
        Mps.start(world.directory)


def test_a_path_too_long_for_sockets_is_refused(world):
    with pytest.raises(MpsError, match="at most 83 bytes"):
        Mps.start(world.directory / ("x" * 80))


def test_the_default_directory_is_of_the_user_and_the_gpus(world, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(world.state))
    everything = mps_directory.default_directory()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    one = mps_directory.default_directory()
    assert one != everything
    assert f"-{os.geteuid()}-" in one.name
    with Mps.start() as daemon:
        assert daemon.directory == one


# --- crashes --------------------------------------------------------------------------------


def test_a_daemon_is_adopted_after_its_user_was_killed(world):
    user = world.user()
    user.kill()
    user.communicate()
    before = world.processes()
    assert len(before) == 2
    with Mps.start(world.directory) as daemon:
        assert world.processes() == before
        assert daemon.clients() == []
    assert world.calls.count("-d") == 1
    assert not world.directory.exists()


@pytest.mark.parametrize("word", ["get_server_list hang", "get_server_list fail broken"])
def test_a_daemon_that_does_not_answer_is_not_adopted(world, word, monkeypatch):
    user = world.user()
    user.kill()
    user.communicate()
    before = {p.pid for p in world.processes()}
    ask = mps.ask_pids

    def answers_at_last(environment, command, timeout_s):
        if not {p.pid for p in world.processes()}.isdisjoint(before):
            return ask(environment, command, 0.5)
        world.behaves()
        return ask(environment, command, timeout_s)

    monkeypatch.setattr(mps, "ask_pids", answers_at_last)
    world.behaves(word)
    with Mps.start(world.directory):
        assert world.processes()
        assert {p.pid for p in world.processes()}.isdisjoint(before)


def test_what_a_dead_daemon_left_is_cleaned(world):
    user = world.user()
    user.kill()
    user.communicate()
    daemon, server = sorted(world.processes(), key=lambda p: p.pid != world.daemon_pid)
    daemon.kill()
    mps_control.end([daemon], 0)
    assert server.is_alive
    with Mps.start(world.directory):
        assert not server.is_alive
        assert len(mps_control.processes_of(world.pipe)) == 2
    assert not world.directory.exists()


def test_a_pid_file_that_names_another_process_is_stale(world):
    with Mps.start(world.directory) as other:
        pid = world.daemon_pid
        second = world.directory.with_name("second")
        (second / "pipe").mkdir(parents=True)
        second.chmod(0o700)
        for stranger in (pid, os.getpid()):
            (second / "pipe" / f"{mps_control.CONTROL}.pid").write_text(str(stranger))
            with Mps.start(second):
                assert len(world.processes()) == 4
            (second / "pipe").mkdir(parents=True)
            second.chmod(0o700)
        assert other.clients() == []
        assert world.daemon_pid == pid


def test_processes_that_use_it_at_the_same_time_share_it(world):
    user = world.user()
    daemon = Mps.start(world.directory)
    again = Mps.start(world.directory)
    pid = world.daemon_pid
    again.stop()
    assert daemon.clients() == []
    user.communicate()
    assert world.daemon_pid == pid
    user = world.user()
    daemon.stop()
    assert world.daemon_pid == pid
    assert world.calls.count("-d") == 1
    user.communicate()
    assert not world.directory.exists()


def test_a_dead_daemon_with_other_users_is_an_error(world):
    user = world.user()
    mps_control.end(world.processes(), 0)
    with pytest.raises(MpsError, match=r"it has died. Stop them"):
        Mps.start(world.directory)
    user.communicate()
    Mps.start(world.directory).stop()


def test_starts_and_stops_at_the_same_time(world):
    def use(_):
        with Mps.start(world.directory) as daemon:
            assert daemon.clients() == []

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(use, range(8)))
    assert not world.directory.exists()


def test_it_ends_also_when_its_directory_was_removed(world):
    daemon = Mps.start(world.directory)
    world.directory.rename(world.directory.with_name("away"))
    with pytest.raises(MpsError, match="has been removed"):
        daemon.clients()
    daemon.stop()
    assert not world.processes()
    assert not world.directory.exists()


def test_a_lock_that_was_removed_while_it_was_taken_is_none(world, monkeypatch):
    place = mps_directory.MpsDirectory(world.directory)
    flock, removed = fcntl.flock, []

    def removed_first(file, operation):
        if not removed:
            removed.append(file)
            (world.directory / "lock").unlink()
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    with (
        place.locked(1, make=True),
        pytest.raises(MpsError, match="locked for 0 s"),
        mps_directory.MpsDirectory(world.directory).locked(0, make=True),
    ):
        pass
    assert removed


def test_a_directory_that_is_removed_while_it_is_made(world, monkeypatch):
    """Somebody else's, who was its last user."""
    mkdir, removed = os.mkdir, []

    def was_there(path, *mode):
        if Path(path) == world.directory and not removed:
            removed.append(path)
            raise FileExistsError(path)
        mkdir(path, *mode)

    monkeypatch.setattr(os, "mkdir", was_there)
    Mps.start(world.directory).stop()
    assert removed


def test_what_is_in_the_way_of_the_directory_is_named(world):
    world.directory.touch()
    with pytest.raises(MpsError, match="must be a directory of yours"):
        Mps.start(world.directory)
    with pytest.raises(MpsError, match=r"cannot be made: .*Not a directory"):
        Mps.start(world.directory / "below")


def test_which_processes_are_alive(world):
    child = subprocess.Popen([world.state.with_name("bin") / fake_mps.SERVER])
    for _ in mps_control.polls(120):  # until it has its name
        process = mps_control.read_process(child.pid)
        if process is not None:
            break
    assert process.is_alive
    assert process.parent == os.getpid()
    earlier = dataclasses.replace(process, started=process.started - 1)  # the same pid before
    assert not earlier.is_alive
    earlier.kill()
    assert process.is_alive
    process.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here
    assert not process.is_alive
    child.wait()
    assert not process.is_alive
    assert mps_control.read_process(os.getpid()) is None


# --- what clients are told ------------------------------------------------------------------


def test_environment_of_a_client(world):
    with Mps.start(world.directory) as daemon:
        assert daemon.environment(40) == {
            "CUDA_MPS_PIPE_DIRECTORY": str(world.pipe),
            "CUDA_MPS_LOG_DIRECTORY": str(world.directory / "log"),
            "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": "40",
        }
        for share in (0, 101, -5, 50.0, "50"):
            with pytest.raises(ValueError, match="from 1 to 100"):
                daemon.environment(share)


def test_a_share_of_this_process_does_not_limit_the_daemon(world, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "30")
    with Mps.start(world.directory) as daemon:
        assert "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE" not in world.daemon_environment
        assert daemon.environment(100)["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] == "100"


@pytest.mark.parametrize(
    ("ours", "clients"), [("2,3", "0,1"), ("1", "0"), ("GPU-5e,GPU-7f", None), ("MIG-5e", None)]
)
def test_clients_count_the_gpus_of_the_daemon(world, monkeypatch, ours, clients):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ours)
    with Mps.start(world.directory) as daemon:
        assert world.daemon_environment["CUDA_VISIBLE_DEVICES"] == ours
        assert daemon.environment(50).get("CUDA_VISIBLE_DEVICES") == clients


def test_a_daemon_for_other_gpus_is_not_shared(world, monkeypatch):
    user = world.user()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with pytest.raises(MpsError, match="serves CUDA_VISIBLE_DEVICES=None, not 1"):
        Mps.start(world.directory)
    user.kill()
    user.communicate()
    with Mps.start(world.directory):  # nobody uses it now
        assert world.daemon_environment["CUDA_VISIBLE_DEVICES"] == "1"


# --- questions ------------------------------------------------------------------------------


def test_clients_and_their_termination(world):
    with Mps.start(world.directory) as daemon:
        assert daemon.clients() == []
        world.has_clients(71, 72)
        assert daemon.clients() == [71, 72]
        daemon.terminate_client(71)
        assert daemon.clients() == [72]
        (command,) = [call for call in world.calls if call.startswith("terminate_client")]
        assert command.split()[2] == "71"
        daemon.terminate_client(71)  # it is gone
        assert sum(call.startswith("terminate_client") for call in world.calls) == 1


@pytest.mark.parametrize("answer", ["CUDA_ERROR_INVALID_VALUE", "999", "Failed to terminate"])
def test_a_client_that_cannot_be_terminated(world, monkeypatch, answer):
    ask = mps.ask

    def refuse(environment, command, timeout_s):
        if command.startswith("terminate_client"):
            return answer
        return ask(environment, command, timeout_s)

    with Mps.start(world.directory) as daemon:
        world.has_clients(71)
        monkeypatch.setattr(mps, "ask", refuse)
        with pytest.raises(MpsError, match=f"did not terminate client 71: {answer}"):
            daemon.terminate_client(71)


def test_a_client_that_ends_meanwhile_is_fine(world, monkeypatch):
    ask = mps.ask

    def ends(environment, command, timeout_s):
        if command.startswith("terminate_client"):
            world.has_clients()
            return "Failed: no such client\n"
        return ask(environment, command, timeout_s)

    with Mps.start(world.directory) as daemon:
        world.has_clients(71)
        monkeypatch.setattr(mps, "ask", ends)
        daemon.terminate_client(71)


def test_questions_are_asked_one_at_a_time(world):
    """By threads, by objects, and by processes; the stand-in fails on those that meet."""
    code = USER.replace("sys.stdin.read()", "for _ in range(8): daemon.clients()")
    with Mps.start(world.directory) as first, Mps.start(world.directory) as second:
        command = [sys.executable, "-c", code, str(world.directory)]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit((first, second)[i % 2].clients) for i in range(16)]
            assert all(done.result() == [] for done in asked)
        assert process.wait() == 0


def test_the_lock_is_not_waited_for_without_end(world, monkeypatch):
    monkeypatch.setattr(mps, "_LOCK_TIMEOUT_S", 0.1)
    daemon = Mps.start(world.directory)
    held, release = threading.Event(), threading.Event()

    def hold():
        with mps_directory.MpsDirectory(world.directory).locked(1):
            held.set()
            release.wait()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(hold)
        held.wait()
        with pytest.raises(MpsError, match=r"kept .*/lock locked for 0\.1 s"):
            daemon.clients()
        release.set()
    daemon.stop()


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("get_client_list hang", r"did not answer 'get_client_list \d+' within 0\.5 s"),
        ("get_client_list fail out of order", r"failed on 'get_client_list \d+' .*out of order"),
        ("get_server_list fail Permission denied", "Permission denied"),
    ],
)
def test_a_control_program_that_hangs_or_fails(world, monkeypatch, behaviour, message):
    ask = mps.ask_pids

    def impatient(environment, command, timeout_s):
        hangs = behaviour == f"{command.split()[0]} hang"
        return ask(environment, command, 0.5 if hangs else timeout_s)

    with Mps.start(world.directory) as daemon:
        monkeypatch.setattr(mps, "ask_pids", impatient)
        world.behaves(behaviour)
        with pytest.raises(MpsError, match=message):
            daemon.clients()


def test_an_answer_that_is_no_list_is_an_error(world, monkeypatch):
    with Mps.start(world.directory) as daemon:
        monkeypatch.setattr(mps_control, "ask", lambda *_: "Cannot find MPS control daemon\n")
        with pytest.raises(MpsError, match=r"with 'Cannot find .*', not with pids"):
            daemon.clients()


def test_a_daemon_that_died_is_an_error(world):
    with Mps.start(world.directory) as daemon:
        mps_control.end(world.processes(), 0)
        with pytest.raises(MpsError, match="Cannot find MPS control daemon process"):
            daemon.clients()
    assert not world.directory.exists()


@pytest.mark.parametrize("behaviour", ["quit hang", "quit fail no", "quit ignore"])
def test_a_daemon_that_does_not_quit_is_killed(world, monkeypatch, behaviour):
    daemon = Mps.start(world.directory)
    monkeypatch.setattr(mps, "_QUERY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(mps, "_QUIT_PATIENCE_S", 0)
    world.behaves(behaviour)
    daemon.stop()
    assert not world.processes()
    assert not world.directory.exists()


# --- why it cannot be started ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("-d fail Permission denied", r"-d failed \(status 1\): Permission denied"),
        ("-d hang", r"-d did not return within 0\.5 s"),
        ("get_server_list fail out of memory", "gave no working daemon.*out of memory"),
    ],
)
def test_a_failed_start_leaves_nothing(world, monkeypatch, behaviour, message):
    if behaviour == "-d hang":
        monkeypatch.setattr(mps, "_START_TIMEOUT_S", 0.5)

    def polls(timeout_s):
        """As if the time were over when the daemon has been asked once."""
        for _ in mps_control.polls(timeout_s):
            yield
            if "get_server_list" in world.calls:
                return

    monkeypatch.setattr(mps, "polls", polls)
    world.behaves(behaviour)
    with pytest.raises(MpsError, match=message):
        Mps.start(world.directory)
    assert not world.processes()
    assert not world.directory.exists()


def test_no_gpu(world, monkeypatch):
    monkeypatch.setattr(mps_checks, "DEVICE", world.state / "nothing")
    with pytest.raises(MpsError, match="needs an NVIDIA GPU"):
        Mps.start(world.directory)


def test_a_gpu_that_may_not_be_used(world, monkeypatch):
    access = os.access
    refused = mps_checks.DEVICE
    monkeypatch.setattr(os, "access", lambda path, mode: path != refused and access(path, mode))
    with pytest.raises(MpsError, match="no permission to use the GPU"):
        Mps.start(world.directory)


@pytest.mark.parametrize("visible", ["", "-1"])
def test_hidden_gpus(world, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(MpsError, match="hides every GPU"):
        Mps.start(world.directory)


def test_no_control_program(world, monkeypatch):
    program = world.state.with_name("bin") / mps_control.CONTROL
    program.chmod(0o644)
    with pytest.raises(MpsError, match=f"no permission to run {program}"):
        Mps.start(world.directory)
    program.unlink()
    with pytest.raises(MpsError, match="is not installed"):
        Mps.start(world.directory)


def test_mps_of_somebody_else(world, monkeypatch):
    foreign = world.directory.with_name("foreign")
    with Mps.start(foreign):
        monkeypatch.setattr(mps_checks, "DEFAULT_PIPE", foreign / "pipe")
        with pytest.raises(MpsError, match=r"daemon of yours is running in .*: stop it"):
            Mps.start()
        Mps.start(world.directory).stop()  # for other GPUs

        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(foreign / "pipe"))
        with pytest.raises(MpsError, match="daemon of yours, and jpd uses only its own: unset"):
            Mps.start(world.directory)
        Mps.start(foreign).stop()  # its own

        # In another container: its pid means nothing here, but it answers.
        (foreign / "pipe" / f"{mps_control.CONTROL}.pid").rename(world.state / "pid")
        with pytest.raises(MpsError, match="daemon of yours"):
            Mps.start(world.directory)
        (world.state / "pid").rename(foreign / "pipe" / f"{mps_control.CONTROL}.pid")
    Mps.start(world.directory).stop()  # it has gone


def test_mps_of_another_user(world, monkeypatch):
    default = world.directory.with_name("default")
    default.mkdir()

    def refuse(pipe):
        raise PermissionError(pipe)

    monkeypatch.setattr(mps_checks, "DEFAULT_PIPE", default)
    monkeypatch.setattr(mps_checks, "daemon_of", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: default.stat().st_uid + 1)
    with pytest.raises(MpsError, match=r"daemon of user .* is running in"):
        Mps.start()


@pytest.mark.parametrize(
    ("mode", "used", "message"),
    [
        ("Exclusive_Process", "GPU-1, 77, other", r"process 77 \(other\) has it"),
        ("Prohibited", "", "compute mode Prohibited"),
        ("Exclusive_Process", "GPU-2, 77, other", None),
        ("Exclusive_Process", "", None),
        ("Default", "GPU-1, 77, other", None),
    ],
)
def test_compute_modes(world, mode, used, message):
    program = world.state.with_name("bin") / "nvidia-smi"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *query-gpu*) echo "GPU-1, {mode}";; *) echo "{used}";; esac\n'
    )
    program.chmod(0o755)
    if message is None:
        Mps.start(world.directory).stop()
        return
    with pytest.raises(MpsError, match=message):
        Mps.start(world.directory)
    assert not world.directory.exists()


# --- what a client got ----------------------------------------------------------------------


def test_visible_sms_are_counted_in_a_context(monkeypatch):
    done = []

    class Device:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            done.append(f"device {self.number}")
            return self

        def __exit__(self, *_):
            pass

        @property
        def attributes(self):
            assert done == ["device 1", "context"]
            return {"MultiProcessorCount": 66}

    cupy = ModuleType("cupy")
    runtime = SimpleNamespace(free=lambda pointer: done.append("context"))
    cupy.cuda = SimpleNamespace(Device=Device, runtime=runtime)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert visible_sms(1) == 66


def test_visible_sms_need_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(MpsError, match=r"pip install jpd\[cuda13\]"):
        visible_sms()
