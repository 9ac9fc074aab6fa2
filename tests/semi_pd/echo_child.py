"""A child for tests: answers what it is asked until its connection ends."""

import os
import sys

from jpd.child import connect, spawn


def main():
    connection = connect()
    while True:
        try:
            question = connection.recv()
        except EOFError:
            return
        match question:
            case "print":
                print("printed by the child", flush=True)
                connection.send(None)
            case "variable", name:
                connection.send(os.environ.get(name))
            case "path":
                connection.send(sys.path)
            case "read", fd:
                connection.send(os.read(fd, 100))
            case "say", answer:
                connection.send(answer)
            case "spawn":
                grandchild = spawn("tests.semi_pd.echo_child")
                grandchild.connection.send(("variable", "PATH"))
                grandchild.connection.recv()
                connection.send(grandchild.process.pid)
            case "exit", code:
                sys.exit(code)


if __name__ == "__main__":
    main()
