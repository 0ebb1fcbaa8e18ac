"""Small servers on this machine that fail as real ones do."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
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


class Proxy:
    """The way to a server of this machine, which may be cut."""

    def __init__(self, port: int) -> None:
        self._target, self._open, self._away = port, [], 0.0
        self.port = 0
        self.cuts = 0
        """Connections that were broken or refused."""

    def cut(self, seconds: float = 0.0) -> None:
        """Break all connections, and those that come within so many seconds."""
        self._away = time.monotonic() + seconds
        while self._open:
            self._close(self._open.pop())

    def carry(self, connection: socket.socket) -> None:
        """Carry a connection's bytes in both directions until one end, or a cut, closes it."""
        if time.monotonic() < self._away:
            self._close(connection)
            return
        with socket.create_connection(("127.0.0.1", self._target)) as server:
            pair = (connection, server)
            self._open += pair
            back = threading.Thread(target=self._copy, args=(server, connection), daemon=True)
            back.start()
            self._copy(*pair)
            back.join()

    def _close(self, connection: socket.socket) -> None:
        self.cuts += 1
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while part := source.recv(65536):
                target.sendall(part)
        for end in (source, target):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@contextmanager
def forwarding(port: int) -> Iterator[Proxy]:
    """A proxy before a port of this machine."""
    proxy = Proxy(port)
    with serving(proxy.carry) as proxy.port:
        yield proxy


def silent(connection: socket.socket) -> None:
    """Read all that comes and never answer."""
    while connection.recv(65536):
        pass


def trickling(connection: socket.socket) -> None:
    """Promise a long answer and send a byte of it every tenth of a second."""
    asked = connection.recv(65536)
    connection.sendall(_head("200 OK", 1 << 20, {"ETag": '"a"', "X-Repo-Commit": "a" * 40}))
    while not asked.startswith(b"HEAD"):  # which has no body
        connection.sendall(b"x")
        time.sleep(0.1)


def http(status: str, body: bytes = b"", length: int | None = None, **headers: str) -> Answer:
    """Answer each request alike; a ``length`` above the body's cuts the answer off in the middle."""
    head = _head(status, len(body) if length is None else length, headers)
    return _answering(lambda path: (head, body, length is not None))


def pages(contents: Mapping[str, bytes], cut: str = "/", **headers: str) -> Answer:
    """Answer what lies under a path, and in the words of the Hugging Face hub that there is nothing.

    Args:
        contents: by path.
        cut: paths that end so are cut off in the middle.
        headers: of each answer.
    """

    def at(path: str) -> tuple[bytes, bytes, bool]:
        body = contents.get(path)
        if body is None:
            what = "EntryNotFound" if "/resolve/" in path else "RepoNotFound"
            return _head("404 Not Found", 2, {"X_Error_Code": what}), b"{}", False
        head = _head("200 OK", len(body), {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', **headers})
        return (head, body[: len(body) // 2], True) if path.endswith(cut) else (head, body, False)

    return _answering(at)


def _head(status: str, length: int, headers: Mapping[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def _answering(at: Callable[[str], tuple[bytes, bytes, bool]]) -> Answer:
    """Answer with the head and the body for a path, and hang up behind it where that is said."""

    def answer(connection: socket.socket) -> None:
        with connection.makefile("rb") as requests:
            while len(first := requests.readline().split()) > 1:  # else it is a chunk of a body
                lines = iter(lambda: requests.readline().strip().lower(), b"")
                lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")]
                requests.read(sum(lengths))
                head, body, last = at(first[1].decode().partition("?")[0])
                connection.sendall(head if first[0] == b"HEAD" else head + body)
                if last and first[0] != b"HEAD":
                    return

    return answer
