"""A stand-in for nvidia-cuda-mps-control and -server: this file, installed under their names.

Knows the commands that `native.mps` uses, and like the real one fails on questions that come at the
same time. It is started hundreds of times, so it imports little. FAKE_MPS names a folder that says
how to behave:

- `behaviour`: lines "WORD hang", "WORD ignore" or "WORD fail TEXT" for a command's first word
  (``-d`` for the start).
- `clients`: the pids of the server's clients.
- `calls`: every command, as they came.
- `environment`: that of the daemon started last.
"""

import fcntl
import os
import signal
import sys
import time

CONTROL, SERVER = "nvidia-cuda-mps-control", "nvidia-cuda-mps-server"
NO_DAEMON = "Cannot find MPS control daemon process"


def install(folder):
    """Writes both programs."""
    with open(__file__) as file:
        source = file.read()
    for name in (CONTROL, SERVER):
        with open(f"{folder}/{name}", "w") as file:
            file.write(f"#!{sys.executable} -S\n{source}")
        os.chmod(f"{folder}/{name}", 0o755)


def read(path):
    with open(path) as file:
        return file.read()


def write(path, text, mode="w"):
    with open(path, mode) as file:
        file.write(text)


def behave(state, word):
    """Does what was asked for this command; whether it is to be ignored."""
    for line in read(f"{state}/behaviour").splitlines():
        name, what, *text = line.split(" ", 2)
        if name == word and what == "hang":
            time.sleep(100)
        if name == word and what == "fail":
            sys.exit(*text)
        if name == word and what == "ignore":
            return True
    return False


def control(state, pipe):
    """Does what stands in standard input, in place of the daemon."""
    for command in sys.stdin.read().splitlines():
        write(f"{state}/calls", f"{command}\n", "a")
        word, *arguments = command.split()
        try:
            busy = os.open(f"{pipe}/control", os.O_RDWR)
            fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            sys.exit(NO_DAEMON)
        except BlockingIOError:
            sys.exit("the daemon is busy")
        if behave(state, word):
            continue
        daemon, server = map(int, os.read(busy, 100).split())
        if not os.path.exists(f"/proc/{daemon}") or ") Z" in read(f"/proc/{daemon}/stat"):
            sys.exit(NO_DAEMON)
        clients = read(f"{state}/clients").split()
        if word == "get_server_list":
            print(server)
        elif word == "get_client_list" and arguments == [str(server)]:
            print(*clients, sep="\n")
        elif word == "terminate_client" and arguments[0] == str(server):
            clients.remove(arguments[1])
            write(f"{state}/clients", " ".join(clients))
        elif word == "quit":
            os.kill(server, signal.SIGKILL)
            os.kill(daemon, signal.SIGKILL)
        else:
            sys.exit(f"what is {command}?")


def daemon(state, pipe):
    """Goes to the background, with a server."""
    write(f"{state}/calls", "-d\n", "a")
    write(f"{state}/environment", "\n".join(f"{k}={v}" for k, v in os.environ.items()))
    behave(state, "-d")
    if os.path.exists(f"{pipe}/control"):
        sys.exit("An instance of this daemon is already running")
    if os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(null, standard)
    path = os.path.join(os.path.dirname(sys.argv[0]), SERVER)
    server = os.posix_spawn(path, [path], os.environ)
    write(f"{pipe}/control", f"{os.getpid()} {server}")
    write(f"{pipe}/{CONTROL}.pid", f"{os.getpid()}\n")
    os.waitpid(server, 0)
    while True:
        signal.pause()


def main():
    if os.path.basename(sys.argv[0]) == SERVER:
        while True:
            signal.pause()
    start = sys.argv[1:] == ["-d"]
    (daemon if start else control)(os.environ["FAKE_MPS"], os.environ["CUDA_MPS_PIPE_DIRECTORY"])


if __name__ == "__main__":
    main()
