"""A process that never becomes the executor that it should."""

from jpd.child import connect


def main():
    connection = connect()
    connection.recv()
    connection.poll(None)


if __name__ == "__main__":
    main()
