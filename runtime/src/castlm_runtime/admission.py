"""Decides who is served first and who is refused, where clients ask for more than the machine can do.

**The order.** Think of a fair machine that works for all addresses at the same time, at equal speed, and for all
requests of one address at equal speed. A request is *due* when that machine would have finished it. castlm serves the
request that is due first. So a short request passes long ones, an address that sends many requests holds up itself
alone, and each request is served in the end, because the clock, which counts work, reaches its due. In units of work:

    due   = clock + cost * requests of the same address that wait or are served
    clock = work done / addresses that wait or are served, summed up

Example: 64 requests of 512 tokens wait, all from this machine, and one of 16 tokens joins them. It is due in 16 * 65
= 1,040 tokens, they are due in up to 512 * 64 = 32,768: it is served next.

**The end of the line.** Where the requests that wait cost more than `most_work` together, the one that is due last is
refused: a long one, of an address that sent many. Where more than `most_waiting` wait, the newest one of the address
with the most requests is refused. So a request that is refused may have waited for a while.

**What this cannot tell apart**: many clients of one address that each send a good request, and one client that opens
many connections. Each connection has its share then, and what exceeds the line is answered with 429 and Retry-After.

**Refusals.** A client that is refused may ask again at once, and a machine that refuses all day computes nothing.
Beyond 20 refusals a second they are sent a second later. Answers are never held back.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    import asyncio

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRY_SECONDS = 5
"""After which a refused client is told to ask again."""
_PER_SECOND = 20.0  # refusals that are sent at once
_HELD_SECONDS = 1.0
_MAX_HELD = 64  # refusals that are held back at the same time


class BusyError(Exception):
    """More waits than the server keeps."""


def address_of(host: str | None) -> str:
    """The address that shares are counted by: of IPv6 the network of 64 bits, as each client has one."""
    import ipaddress

    try:
        address = ipaddress.ip_address((host or "").partition("%")[0])
    except ValueError:
        return host or ""
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.ip_network((int(address) >> 64 << 64, 64)))
    return str(address)


@dataclass(frozen=True)
class _Place:
    address: str
    cost: float
    due: float


class Line(Generic[Item]):
    """Items that wait or are served, in the order in which they are due; see the module. Not safe among threads.

    Args:
        most_waiting: items that wait, at most.
        most_work: what they cost together, at most; a single one may cost more.
    """

    def __init__(self, most_waiting: int, most_work: float):
        self.most_waiting, self.most_work = most_waiting, most_work
        self._clock = 0.0
        self._waiting: dict[Item, _Place] = {}
        self._served: dict[Item, _Place] = {}

    def join(self, item: Item, address: str, cost: float) -> list[Item]:
        """Adds an item; returns those that are refused for it and have left, perhaps itself."""
        others = sum(place.address == address for place in self._places())
        self._waiting[item] = _Place(address, cost, self._clock + cost * (others + 1))
        refused = []
        if len(self._waiting) > self.most_waiting:
            counts = Counter(place.address for place in self._waiting.values())
            most = max(counts.values())
            newest = next(i for i, place in reversed(self._waiting.items()) if counts[place.address] == most)
            del self._waiting[newest]
            refused.append(newest)
        while len(self._waiting) > 1 and sum(place.cost for place in self._waiting.values()) > self.most_work:
            last = max(reversed(self._waiting), key=lambda other: self._waiting[other].due)  # the newest of equals
            del self._waiting[last]
            refused.append(last)
        return refused

    def waiting(self) -> list[Item]:
        """The items that wait, the one that is due first at the beginning."""
        return sorted(self._waiting, key=lambda item: self._waiting[item].due)

    def served(self) -> list[Item]:
        """The items that are served, in the same order."""
        return sorted(self._served, key=lambda item: self._served[item].due)

    def begin(self, item: Item) -> None:
        """An item that waited is served from now on."""
        self._served[item] = self._waiting.pop(item)

    def leave(self, item: Item) -> None:
        """Removes an item that is finished or waits no longer; does nothing if it has left."""
        self._waiting.pop(item, None)
        self._served.pop(item, None)

    def work(self, amount: float) -> None:
        """Counts work that was done for the served items."""
        self._clock += amount / max(1, len({place.address for place in self._places()}))

    def _places(self) -> Iterator[_Place]:
        yield from self._waiting.values()
        yield from self._served.values()


class Worker:
    """Runs functions in a thread, one at a time, in the order of a `Line`."""

    def __init__(self, most_waiting: int, most_work: float):
        self._line: Line[asyncio.Future[None]] = Line(most_waiting, most_work)

    async def run(self, function: Callable[..., Result], *arguments: Any, address: str, cost: float) -> Result:
        """The result of `function(*arguments)`. Raises `BusyError` if it is refused."""
        import asyncio  # imported where it is used: the engine alone starts sooner

        from anyio import to_thread  # comes with Starlette, which only the server needs

        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for refused in self._line.join(turn, address, cost):
            if not refused.done():
                refused.set_exception(BusyError("too many requests are being read: try again later"))
        self._begin_next()
        try:
            await turn
            return await to_thread.run_sync(function, *arguments)
        finally:
            if turn in self._line.served():
                self._line.work(cost)
            self._line.leave(turn)
            self._begin_next()

    def _begin_next(self) -> None:
        waiting = self._line.waiting()
        if waiting and not self._line.served():
            self._line.begin(waiting[0])
            if not waiting[0].done():  # cancelled: it leaves when its task runs
                waiting[0].set_result(None)


class Bodies:
    """The bodies of requests that have not come whole, of `most_bytes` together; beyond, the longest one is dropped."""

    def __init__(self, most_bytes: int):
        self.most_bytes = most_bytes
        self._held: dict[int, bytearray] = {}

    @contextlib.contextmanager
    def hold(self) -> Iterator[Callable[[bytes], bytearray]]:
        """Gives a function that adds a part to a body and returns all of it; raises `BusyError` once it is dropped."""
        body = bytearray()
        self._held[id(body)] = body

        def add(part: bytes) -> bytearray:
            body.extend(part)
            if sum(map(len, self._held.values())) > self.most_bytes:
                self._held.pop(id(longest := max(self._held.values(), key=len)))
                longest.clear()
            if id(body) not in self._held:
                body.clear()
                raise BusyError("too many long requests are being sent: try again later")
            return body

        try:
            yield add
        finally:
            self._held.pop(id(body), None)


class Refusals:
    """Holds refusals back where there are too many; see the module."""

    def __init__(self) -> None:
        self._level, self._then, self._num_held = 0.0, time.monotonic(), 0

    async def wait(self) -> None:
        """Returns when the next refusal may be sent."""
        import asyncio

        now = time.monotonic()
        level = max(0.0, self._level - _PER_SECOND * (now - self._then)) + 1
        self._level = min(level, 2 * _PER_SECOND)  # soon forgotten
        self._then = now
        if self._level > _PER_SECOND and self._num_held < _MAX_HELD:
            self._num_held += 1
            try:
                await asyncio.sleep(_HELD_SECONDS)
            finally:
                self._num_held -= 1
