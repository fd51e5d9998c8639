"""The HTTP server: uvicorn, with a deadline for each state of a connection, and an end that every client hears of.

A connection waits for a request, is answered, or ends. uvicorn has no deadline for a request that begins and never
ends, nor for a client that does not read its answer, and counts both among the connections that it allows. Here each
state has a deadline, and where too many connections wait for a request, the oldest one gives way, of the address that
has the most of them. Each connection is read once before it can be that one: connections are taken in by no more than
`_AT_ONCE` in a turn of the event loop, and two turns later they are read.
A connection that is closed while its client still sends would be reset, and the client could not read the answer; so
the rest is read and thrown away first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from castlm_runtime.admission import address_of
from castlm_runtime.engine import Engine

MAX_CONNECTIONS = 256
"""Connections without a whole request; those that are being answered are limited by `castlm_runtime.admission`."""
_AT_ONCE = 100
REQUEST_SECONDS = 10.0
"""For a client to send the head of a request, or the rest of one that is answered already; the application limits the
time for its body."""
READ_SECONDS = 30.0
"""For a client to read what fills the buffers of its connection."""
_END_SECONDS = 2.0  # for the answers to reach their clients when the server ends


class _Transport:
    """The transport of a connection, whose `close` waits for the rest of the request."""

    def __init__(self, transport: Any, connection: Connection):
        self._transport, self._connection = transport, connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._connection.is_ending or self._transport.is_closing()

    def close(self) -> None:
        if not self._connection.is_sending() or not self._transport.can_write_eof():
            self._transport.close()
        elif not self.is_closing():
            self._connection.is_ending = True
            self._transport.write_eof()
            self._transport.resume_reading()


class Connection(H11Protocol):
    """A connection, which is cut at the deadline of its state."""

    is_ending = False
    """Whether it has been closed, but for what the client still sends."""
    _request_timer: asyncio.TimerHandle | None = None
    _read_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        self._await_request()
        self.address = address_of(self.client[0] if self.client else None)
        if len(self.connections) > MAX_CONNECTIONS:
            self._make_room()

    def _make_room(self) -> None:
        others = [other for other in self.connections if isinstance(other, Connection)]
        open_ones = [other for other in others if other.is_ending or not other.transport.is_closing()]
        waiting = [other for other in open_ones if other.is_waiting()]
        if len(waiting) > MAX_CONNECTIONS:
            counts = Counter(other.address for other in waiting)
            most = max(counts.values())
            candidates = [other for other in waiting if counts[other.address] == most]
            min(candidates, key=lambda other: other.waits_since).transport.abort()

    def is_waiting(self) -> bool:
        """Whether the client has not sent its whole request yet, or no further one."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def is_sending(self) -> bool:
        """Whether the client may send more of its request."""
        return self.cycle is None or self.cycle.more_body

    def _await_request(self) -> None:
        self._cancel_request_timer()
        self.waits_since = self.loop.time()
        self._request_timer = self.loop.call_later(REQUEST_SECONDS, self.transport.abort)

    def _cancel_request_timer(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    def data_received(self, data: bytes) -> None:
        if not self.is_ending:
            super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete and not self.transport.is_closing():
            self._cancel_request_timer()
        if self.conn.trailing_data[0] and self.cycle is not None and not self.cycle.more_body:
            # Requests before the answer to the first one would be read without end: it is the last one.
            self.cycle.keep_alive = False

    def send_400_response(self, msg: str) -> None:
        """Answers what is no HTTP, unless an answer has begun; the application hears that the client has gone away."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        super().send_400_response(msg)
        self._await_request()

    def on_response_complete(self) -> None:
        self._await_request()  # before the next request, which may be there already
        super().on_response_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._read_timer = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_timer is not None:
            self._read_timer.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_request_timer()
        if self._read_timer is not None:
            self._read_timer.cancel()
        super().connection_lost(exc)


class Server(uvicorn.Server):
    """Serves `app` at an address; when it ends, every answer ends with an error that its client reads."""

    def __init__(self, app: Starlette, engine: Engine, host: str, port: int):
        super().__init__(
            uvicorn.Config(
                app,
                host=host,
                port=port,
                http=Connection,
                ws="none",
                backlog=_AT_ONCE,
                proxy_headers=False,  # a client could give any address as its own
                log_level="error",  # a line for each bad request would fill a disk
                timeout_graceful_shutdown=30,
            )
        )
        self.engine = engine

    async def shutdown(self, sockets: Any = None) -> None:
        await asyncio.to_thread(self.engine.close)
        # A task that uvicorn cancels leaves a traceback; one whose connection is cut ends by itself.
        asyncio.get_running_loop().call_later(_END_SECONDS, self._cut)
        await super().shutdown(sockets)

    def _cut(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
