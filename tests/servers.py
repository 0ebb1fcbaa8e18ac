"""Small servers on this machine that fail as real ones do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

Answer = Callable[[socket.socket], None]
"""What a server does with a connection, which is closed behind it."""


@contextmanager
def serving(answer: Answer) -> Iterator[int]:
    """A server on all interfaces, as Ray takes 127.0.0.1 for the machine's own address; gives its port."""
    connections: list[socket.socket] = []

    def serve(connection: socket.socket) -> None:
        with suppress(OSError), connection:
            answer(connection)

    def accept(listening: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listening.accept()
                connections.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with closing(socket.create_server(("", 0))) as listening:
        thread = threading.Thread(target=accept, args=(listening,), daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            for connection in connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join()


def silent(connection: socket.socket) -> None:
    """Read all that comes and never answer."""
    while connection.recv(65536):
        pass


def http(status: str, body: bytes = b"", length: int | None = None, **headers: str) -> Answer:
    """Answer each request alike; a ``length`` above the body's cuts the answer off in the middle."""
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body) if length is None else length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    whole = ("\r\n".join(lines) + "\r\n\r\n").encode()

    def answer(connection: socket.socket) -> None:
        with connection.makefile("rb") as requests:
            while first := requests.readline():
                while requests.readline().strip():
                    pass
                connection.sendall(whole if first.startswith(b"HEAD") else whole + body)
                if length is not None and not first.startswith(b"HEAD"):
                    return

    return answer
