"""The connections below HTTP: how many there may be, and how long one may keep the server waiting for a request.

What uvicorn is started with bounds neither, and an application sees a request only once its head is complete. So this
stands between the sockets and uvicorn's own protocol, put there while the application starts.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import psutil

log = logging.getLogger(__name__)

# From a connection's first byte, or from its opening when none comes, to the end of a request's head.
HEAD_SECONDS = 10.0
# A closed connection whose client may still be sending: at once, the client's system would throw the answer away unread.
LINGER_SECONDS = 2.0
# Descriptors that are never connections: files, and what libraries open.
RESERVED_DESCRIPTORS = 64
# So many turns of the event loop pass from accepting a connection to having closed one too many.
TURNS_TO_CLOSE = 4
BACKLOG = 2048
# A flood of broken requests would otherwise flood the log, too.
SECONDS_BETWEEN_MESSAGES = 1.0
FLOODED_LOGGERS = ("uvicorn.error", "asyncio")

current: ContextVar[Connection | None] = ContextVar("connection", default=None)


class Connection(asyncio.Protocol):
    """Pass everything on to the server's own protocol, and know whether the client or the server is to act."""

    def __init__(self, connections: Connections, protocol: Any) -> None:
        self.connections, self.protocol = connections, protocol
        self.transport: Any = None
        self.in_request = self.has_sent = self.lingers = False
        self.deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.connections.opened(self)
        self._expect_head()
        with self._as_current():
            self.protocol.connection_made(LingeringTransport(self))

    def data_received(self, data: bytes) -> None:
        if self.lingers:
            return
        self.has_sent = True
        if not self.in_request:
            self._expect_head()
        with self._as_current():
            self.protocol.data_received(data)

    def eof_received(self) -> Any:
        return None if self.lingers else self.protocol.eof_received()

    def pause_writing(self) -> None:
        self.protocol.pause_writing()

    def resume_writing(self) -> None:
        self.protocol.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_complete()
        self.connections.closed(self)
        if not self.lingers:
            self.protocol.connection_lost(exc)

    def reading(self) -> None:
        """Note that a request's head is complete; its body has a limit of its own."""
        self._head_is_complete()
        self.in_request = True
        self.connections.waits_for_client(self)

    def working(self) -> None:
        """Note that the server is to act: such a connection is never closed to make room."""
        self.connections.waits_for_server(self)

    def done(self) -> None:
        """Note that a request has ended and another may come."""
        self.in_request = self.has_sent = False
        self.connections.waits_for_client(self)

    def linger(self) -> None:
        """Close for the server only: the client reads the end, and what it still sends is dropped for a short while."""
        self._head_is_complete()
        self.lingers = True
        self.connections.waits_for_client(self)
        loop = asyncio.get_running_loop()
        loop.call_soon(self.protocol.connection_lost, None)
        loop.call_later(LINGER_SECONDS, self.transport.close)
        try:
            self.transport.write_eof()
            self.transport.resume_reading()
        except OSError:  # the client has gone in this moment
            self.transport.abort()

    @contextmanager
    def _as_current(self) -> Iterator[None]:
        token = current.set(self)  # tasks that the protocol starts inherit it
        try:
            yield
        finally:
            current.reset(token)

    def _expect_head(self) -> None:
        if self.deadline is None:
            self.deadline = asyncio.get_running_loop().call_later(HEAD_SECONDS, self._too_slow)

    def _head_is_complete(self) -> None:
        if self.deadline:
            self.deadline.cancel()
            self.deadline = None

    def _too_slow(self) -> None:
        self.deadline = None
        self.connections.close(self, "sent no whole request head in time")


class LingeringTransport:
    """A transport that does not close on a client in the middle of what it sends, and drops what nobody will read."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection.transport, name)

    def is_closing(self) -> bool:
        return self._connection.lingers or self._connection.transport.is_closing()

    def write(self, data: bytes) -> None:
        # The rest of an answer may be written before the protocol hears that its client has gone. The event loop would
        # log each of those writes.
        if not self.is_closing():
            self._connection.transport.write(data)

    def close(self) -> None:
        transport = self._connection.transport
        if self._connection.has_sent and transport.can_write_eof() and not self.is_closing():
            self._connection.linger()
        elif not self._connection.lingers:
            transport.close()


class Connections:
    """All connections of one server. When there are too many, the one that has waited longest for its client goes."""

    def __init__(self, most: int, accepted_at_once: int) -> None:
        self.most, self.accepted_at_once = most, accepted_at_once
        self.idle: OrderedDict[Connection, None] = OrderedDict()  # the client is to act; longest first
        self.busy: set[Connection] = set()
        self._closed: dict[str, int] = {}
        self._quiet: asyncio.TimerHandle | None = None

    def opened(self, connection: Connection) -> None:
        """Count a new connection, and make room for it."""
        self.idle[connection] = None
        if len(self.idle) + len(self.busy) > self.most:
            self.close(next(iter(self.idle)), f"would have been more than {self.most} at once")

    def waits_for_client(self, connection: Connection) -> None:
        """Put a connection behind all others that wait for their client."""
        if self._forget(connection):
            self.idle[connection] = None

    def waits_for_server(self, connection: Connection) -> None:
        """Keep a connection from being closed."""
        if self._forget(connection):
            self.busy.add(connection)

    def closed(self, connection: Connection) -> None:
        """Count a connection no more."""
        self._forget(connection)

    def close(self, connection: Connection, reason: str) -> None:
        """Close a connection at once; the log says so once a second at most."""
        self._forget(connection)
        if connection.transport is not None:
            connection.transport.abort()
        self._closed[reason] = self._closed.get(reason, 0) + 1
        if self._quiet is None:
            self._report()

    def _report(self) -> None:
        self._quiet = None
        if self._closed:
            log.warning("connections closed: %s", ", ".join(f"{count} {why}" for why, count in self._closed.items()))
            self._closed.clear()
            self._quiet = asyncio.get_running_loop().call_later(SECONDS_BETWEEN_MESSAGES, self._report)

    def _forget(self, connection: Connection) -> bool:
        known = connection in self.busy or connection in self.idle
        self.busy.discard(connection)
        self.idle.pop(connection, None)
        return known


class OncePerSecond(logging.Filter):
    """Let a message pass once a second at most."""

    def __init__(self) -> None:
        super().__init__()
        self._next: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, message = time.monotonic(), str(record.msg)[:80]
        if now < self._next.get(message, 0.0):
            return False
        self._next = {text: at for text, at in self._next.items() if at > now}
        self._next[message] = now + SECONDS_BETWEEN_MESSAGES
        return True


@contextmanager
def bounded_connections() -> Iterator[Connections]:
    """Bound the connections of every listener that is opened meanwhile: uvicorn opens its own after this is entered."""
    loop = asyncio.get_running_loop()
    connections = Connections(*connection_limits())
    openers = {name: getattr(loop, name) for name in ("create_server", "create_unix_server")}
    quiet = OncePerSecond()

    def bounded(open_listener: Callable[..., Any]) -> Callable[..., Any]:
        async def open_bounded(factory: Callable[[], Any], *arguments: Any, **options: Any) -> Any:
            def protocol() -> Connection:
                return Connection(connections, factory())

            server = await open_listener(protocol, *arguments, **{**options, "backlog": connections.accepted_at_once})
            for listener in server.sockets:
                # The event loop accepts as many at once as may wait in the kernel, unless that is changed behind it.
                with suppress(OSError), socket.fromfd(listener.fileno(), listener.family, listener.type) as same:
                    same.listen(options.get("backlog", BACKLOG))
            return server

        return open_bounded

    for name, opener in openers.items():
        setattr(loop, name, bounded(opener))
    for name in FLOODED_LOGGERS:
        logging.getLogger(name).addFilter(quiet)
    try:
        yield connections
    finally:
        for name, opener in openers.items():
            setattr(loop, name, opener)
        for name in FLOODED_LOGGERS:
            logging.getLogger(name).removeFilter(quiet)


def connection_limits() -> tuple[int, int]:
    """Return how many connections leave room for other descriptors, and how many may be accepted in one turn."""
    limit = 2**16
    try:
        import resource
    except ImportError:  # Windows has no such limit
        pass
    else:
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        limit = limit if soft == resource.RLIM_INFINITY else min(soft, limit)
    at_once = min(64, max(4, limit // 32))
    others = RESERVED_DESCRIPTORS + TURNS_TO_CLOSE * at_once
    return max(16, limit - len(psutil.Process().open_files()) - others), at_once
