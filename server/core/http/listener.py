"""The address that a server listens on, without what serves it."""

from __future__ import annotations

import socket

from slipstream.errors import InvalidRequestError


def bind(host: str, port: int) -> socket.socket:
    """A socket bound to an address, which refuses connections until it is served.

    Raises ``InvalidRequestError`` for an address that cannot be had.
    """
    listener: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise InvalidRequestError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Choose another --host"
            " or --port"
        ) from error
    return listener


def share(listener: socket.socket, count: int) -> list[socket.socket]:
    """So many sockets on the address of a bound one, which is closed: the system divides
    connections among them.

    Until then nobody else could take that address; and whoever asks for it alone will not get it.
    """
    family, kind, address = listener.family, listener.type, listener.getsockname()
    listener.close()
    sockets = []
    for _ in range(count):
        each = socket.socket(family, kind)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        each.bind(address)
        sockets.append(each)
    return sockets


def url_of(listener: socket.socket) -> str:
    """Where a bound socket can be reached."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
