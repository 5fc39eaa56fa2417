"""The model's transfer time held against reality: bytes streamed over loopback through a limiter, timed at the receiving end."""

import socket
import threading
import time

from vitbench.edge.profiles import Link
from vitbench.errors import InputError

CHUNK = 16 * 1024  # bytes that go out at once


def stream(content: bytes, link: Link) -> float:
    """Send bytes through a socket at the link's latency and bandwidth; seconds from the request to the last byte.

    The receiver asks with one byte; the sender waits for the latency, then sends no faster than the bandwidth.

    Raises:
        InputError: nothing to send, or not everything arrived.
    """
    if not content:
        raise InputError("nothing to stream: there are no bytes")
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = threading.Thread(target=_serve, args=(server, content, link), daemon=True)
        sender.start()
        with socket.create_connection(server.getsockname()) as receiver:
            start = time.perf_counter()
            receiver.sendall(b"?")
            count = 0
            while part := receiver.recv(1 << 20):
                count += len(part)
            seconds = time.perf_counter() - start
        sender.join()
    if count != len(content):
        raise InputError(
            f"{count:,} of {len(content):,} bytes arrived; something on this machine cuts local connections"
        )
    return seconds


def _serve(server: socket.socket, content: bytes, link: Link) -> None:
    connection, _ = server.accept()
    with connection:
        connection.recv(1)
        begin = time.perf_counter() + link.latency.value
        for start in range(0, len(content), CHUNK):
            part = content[start : start + CHUNK]
            due = begin + (start + len(part)) / link.bandwidth.value  # when the part would have gone through the link
            if (wait := due - time.perf_counter()) > 0:
                time.sleep(wait)
            connection.sendall(part)
