"""Who is served first, and who is refused: the model of `castlm_runtime.admission` on whole days of requests."""

import asyncio
import random
import threading
from types import SimpleNamespace

import pytest

from castlm_runtime import admission
from castlm_runtime.admission import Bodies, BusyError, Line, Refusals, Worker, address_of


def served_after(line: Line[str], item: str) -> float:
    """The work that is done before an item is served, where each takes what it costs."""
    done = 0.0
    while (first := line.waiting()[0]) != item:
        done += serve(line, first)
    return done


def serve(line: Line[str], item: str) -> float:
    cost = line._waiting[item].cost
    line.begin(item)
    line.work(cost)
    line.leave(item)
    return cost


def test_a_short_request_passes_long_ones_and_these_are_served_too():
    line: Line[str] = Line(200, 1e9)
    for number in range(64):
        assert line.join(f"long {number}", "here", 512) == []
    assert line.join("short", "here", 16) == []
    assert served_after(line, "short") <= 2 * 512  # it is due in 65 * 16 tokens
    line.leave("short")
    done = 0.0
    for number in range(10_000):  # however many short ones follow
        line.join(f"short {number}", "here", 16)
        first = line.waiting()[0]
        done += serve(line, first)
        if first == "long 63":
            break
    assert 64 * 512 < done < 3 * 64 * 512


def test_an_address_that_sends_many_requests_holds_up_itself_alone():
    line: Line[str] = Line(200, 1e9)
    for number in range(64):
        line.join(f"flood {number}", "there", 100)
    line.join("good", "here", 300)
    assert served_after(line, "good") <= 2 * 300  # half of the work is for the other address


def test_the_long_and_the_many_are_refused():
    line: Line[str] = Line(most_waiting=4, most_work=1000)
    assert [line.join(name, "there", 300) for name in "abc"] == [[], [], []]
    assert line.join("cheap", "here", 200) == ["c"]  # the last of the address that has more
    assert line.join("long", "there", 900) == ["long"]
    assert line.join("longest", "new", 5000) == ["longest"]
    assert line.join("x", "here", 1) == []
    assert line.join("y", "new", 1) == ["x"]  # of two addresses with two: the newest
    for name in (*"aby", "cheap"):
        line.leave(name)
    assert line.join("longest", "new", 5000) == []  # where nothing else waits


def test_each_connection_of_an_address_has_its_share():
    """Ten ask for 8 to 500 tokens as often as they are answered: none gets twice the work of another one."""
    line: Line[str] = Line(200, 1e9)
    work, draw = dict.fromkeys("abcdefghij", 0.0), random.Random(0)
    costs = {name: draw.choice([8, 60, 500]) for name in work}
    for name, cost in costs.items():
        line.join(name, "here", cost)
    while sum(work.values()) < 200_000:
        first = line.waiting()[0]
        work[first] += serve(line, first)
        line.join(first, "here", costs[first])
    assert max(work.values()) < 2 * min(work.values())


def test_addresses_are_those_of_one_client():
    assert address_of("192.168.7.3") == address_of("::ffff:192.168.7.3") != address_of("192.168.7.4")
    assert address_of("2001:db8:1:2::3") == address_of("2001:db8:1:2:ffff::9%eth0") != address_of("2001:db8:1:3::3")
    assert address_of(None) == ""
    assert address_of("unix socket") == "unix socket"


def test_a_worker_does_one_thing_at_a_time_and_the_short_ones_first():
    done, running, are_queued = [], threading.Semaphore(1), threading.Event()

    def work(name: str) -> str:
        assert running.acquire(blocking=False)
        assert are_queued.wait(60)
        done.append(name)
        running.release()
        if name == "bad":
            raise ValueError(name)
        return name

    async def all_of_them() -> list[object]:
        worker = Worker(most_waiting=4, most_work=1e9)
        first = asyncio.ensure_future(worker.run(work, "first", address="here", cost=1))
        await asyncio.sleep(0)
        names = [("long", 900), ("bad", 9), ("gone", 8), ("short", 1), ("one too many", 1)]
        tasks = [asyncio.ensure_future(worker.run(work, name, address="here", cost=c)) for name, c in names]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.sleep(0)
        are_queued.set()
        return await asyncio.gather(first, *tasks, return_exceptions=True)

    first, long, bad, gone, short, refused = asyncio.run(all_of_them())
    assert (first, long, short) == ("first", "long", "short")
    assert isinstance(bad, ValueError)
    assert isinstance(gone, asyncio.CancelledError)
    assert isinstance(refused, BusyError)
    assert done == ["first", "short", "bad", "long"]


def test_the_longest_body_is_dropped():
    bodies = Bodies(1000)
    with bodies.hold() as slow, bodies.hold() as good:
        assert slow(b"x" * 900) == b"x" * 900
        assert good(b"a" * 90) == b"a" * 90
        assert good(b"b" * 90) == b"a" * 90 + b"b" * 90
        with pytest.raises(BusyError):
            slow(b"x")
        assert good(b"c" * 800)[-1:] == b"c"
        with pytest.raises(BusyError):
            good(b"d" * 100)
    assert bodies._held == {}


def test_many_refusals_are_held_back_and_few_are_not(monkeypatch):
    now, held, pause = 0.0, [], asyncio.sleep
    monkeypatch.setattr(admission, "time", SimpleNamespace(monotonic=lambda: now))

    async def sleep(seconds: float) -> None:
        held.append(seconds)
        await pause(0)

    async def refuse(number: int, refusals: Refusals) -> None:
        await asyncio.gather(*(refusals.wait() for _ in range(number)))

    monkeypatch.setattr(asyncio, "sleep", sleep)
    refusals = Refusals()
    asyncio.run(refuse(15, refusals))
    assert held == []
    asyncio.run(refuse(150, refusals))
    assert held == [admission._HELD_SECONDS] * admission._MAX_HELD
    now, held[:] = now + 2, []
    asyncio.run(refuse(5, refusals))
    assert held == []
