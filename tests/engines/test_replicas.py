"""Which server gets a row, how many requests at once, which servers are left alone: in virtual time, no sockets."""

import asyncio
import time
from contextlib import AsyncExitStack

import pytest

from tessy_hf.engines.connections import ReplicaError
from tessy_hf.engines.replicas import MOVE_SECONDS, PROBE_SECONDS, Replica, Replicas, Service
from tessy_hf.errors import EngineDeadError, RequestError
from tests.engines import virtual_time

SERVICE = Service("generate", exact=True, context_length=2048, cache_tokens=1000)


def servers(*names, most=8, outage_seconds=120.0):
    replicas = Replicas(outage_seconds)
    replicas.change([Replica(name, SERVICE, most) for name in names])
    return replicas


async def ask(replicas, row, error=None):
    """Take one turn, which fails with an error or succeeds; return where it was."""
    async with replicas.turn(row) as turn:
        if error is not None:
            raise error
        return turn.url


async def fail(replicas, row, kind, retry_after=None):
    with pytest.raises(ReplicaError):
        await ask(replicas, row, ReplicaError(f"{kind}!", kind, retry_after))


def rows_of(replicas):
    return {replica.url: replica.rows for replica in replicas}


def in_virtual_time(test):
    """Run an asynchronous test in virtual time."""

    def run(*args, **kwargs):
        virtual_time.run(test(*args, **kwargs))

    run.__name__, run.__doc__ = test.__name__, test.__doc__
    run.pytestmark = getattr(test, "pytestmark", [])
    return run


# --- which server


@in_virtual_time
async def test_a_row_stays_with_its_server_and_a_new_one_goes_to_the_server_with_the_fewest():
    replicas = servers("a", "b", "c")
    homes = {f"r{i}": await ask(replicas, f"r{i}") for i in range(30)}
    assert rows_of(replicas) == {"a": 10, "b": 10, "c": 10}
    assert {row: await ask(replicas, row) for row in homes} == homes
    for row in [row for row, home in homes.items() if home == "b"]:
        replicas.release(row)
    assert rows_of(replicas) == {"a": 10, "b": 0, "c": 10}
    assert {await ask(replicas, f"new {i}") for i in range(10)} == {"b"}


@in_virtual_time
async def test_where_rows_begin_depends_on_their_keys_alone():
    first, second = servers("a", "b"), servers("a", "b")
    assert [await ask(first, str(i)) for i in range(20)] == [await ask(second, str(i)) for i in range(20)]


@pytest.mark.parametrize("kind", ["down", "lost", "invalid"])
def test_a_row_moves_when_its_server_fails_it_and_stays_where_it_went(kind):
    async def test():
        replicas = servers("a", "b")
        before = await ask(replicas, "r")
        await fail(replicas, "r", kind)
        after = await ask(replicas, "r")
        await asyncio.sleep(1000)
        assert before != after == await ask(replicas, "r")

    virtual_time.run(test())


@in_virtual_time
async def test_a_row_waits_for_a_server_that_is_busy_for_a_moment_and_leaves_one_that_is_for_long():
    replicas = servers("a", "b")
    home = await ask(replicas, "r")
    await fail(replicas, "r", "busy", retry_after=MOVE_SECONDS / 2)
    begin = time.monotonic()
    assert await ask(replicas, "r") == home and time.monotonic() >= begin + MOVE_SECONDS / 2
    await fail(replicas, "r", "busy", retry_after=MOVE_SECONDS * 2)
    begin = time.monotonic()
    assert await ask(replicas, "r") != home and time.monotonic() == begin


@in_virtual_time
async def test_what_the_row_is_told_does_not_move_it():
    replicas = servers("a", "b")
    home = await ask(replicas, "r")
    with pytest.raises(RequestError):
        await ask(replicas, "r", RequestError("too long"))
    assert await ask(replicas, "r") == home


@in_virtual_time
async def test_a_server_that_is_down_gets_no_rows_until_its_pause_is_over():
    replicas = servers("a", "b")
    (a, b) = replicas
    await fail(replicas, "r", "down", retry_after=30.0)
    down, well = (a, b) if a.down else (b, a)
    assert {await ask(replicas, f"r{i}") for i in range(9)} == {well.url}
    await asyncio.sleep(31)
    assert {await ask(replicas, f"s{i}") for i in range(5)} == {down.url} and not down.down


# --- how many at once


def turns(replica, count):
    """Ask for turns at one server."""
    return [asyncio.ensure_future(replica.enter()) for _ in range(count)]


async def granted(entering):
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return [each.result() for each in entering if each.done()]


@in_virtual_time
async def test_turns_are_taken_in_the_order_in_which_they_were_asked_for():
    replica, order = Replica("a", SERVICE, 2), []

    async def visit(number):
        turn = await replica.enter()
        order.append(number)
        await asyncio.sleep(1)
        replica.leave(turn)

    await asyncio.gather(*map(visit, range(10)))
    assert order == list(range(10))


@in_virtual_time
async def test_a_server_that_is_busy_is_asked_for_half_once_for_what_was_sent_together():
    replica = Replica("a", SERVICE, 8)
    together = await granted(turns(replica, 8))
    assert len(together) == 8
    for turn in together:
        replica.failed(turn, ReplicaError("busy", "busy"))
        replica.leave(turn)
    await asyncio.sleep(60)
    entering = turns(replica, 8)
    assert len(await granted(entering)) == 4
    for each in entering[:4]:  # each answer lets a little more be asked: 4 of them one more
        replica.answered(each.result())
        replica.leave(each.result(), answered=True)
    assert len(await granted(entering)) == 8
    more = turns(replica, 8)
    for each in entering[4:]:
        replica.leave(each.result(), answered=True)
    assert len(await granted(more)) == 5


@in_virtual_time
async def test_a_row_that_is_cancelled_takes_no_turn_with_it():
    replica = Replica("a", SERVICE, 1)
    (turn,) = await granted(turns(replica, 1))
    waiting = turns(replica, 3)
    await asyncio.sleep(0)
    waiting[0].cancel()
    replica.leave(turn)  # grants the turn, in the same step, to the next one
    waiting[1].cancel()
    await asyncio.gather(*waiting[:2], return_exceptions=True)
    assert await waiting[2] is not None


@in_virtual_time
async def test_one_request_finds_out_whether_a_server_that_was_down_serves_again():
    replicas = servers("a")
    (a,) = replicas
    await fail(replicas, "r", "down")
    async with AsyncExitStack() as stack:
        probe = await stack.enter_async_context(replicas.turn("r0"))
        others = [asyncio.ensure_future(ask(replicas, f"r{i}")) for i in range(1, 6)]
        await asyncio.sleep(PROBE_SECONDS / 2)
        assert not any(other.done() for other in others)
        probe.answered()
        assert not a.down
        assert await asyncio.gather(*others) == ["a"] * 5


@in_virtual_time
async def test_a_request_that_takes_long_does_not_keep_the_others_from_a_server_that_was_down():
    replicas = servers("a")
    await fail(replicas, "r", "down")
    async with replicas.turn("r0"):
        begin = time.monotonic()
        assert await asyncio.gather(*(ask(replicas, f"r{i}") for i in range(1, 6))) == ["a"] * 5
        assert time.monotonic() <= begin + PROBE_SECONDS + 0.1


# --- how long it is left alone


@in_virtual_time
async def test_pauses_grow_while_a_server_fails_and_begin_anew_once_it_answered():
    replicas, pauses = servers("a", outage_seconds=1e9), []
    (a,) = replicas
    for _ in range(12):
        await fail(replicas, "r", "down")
        pauses.append(a.pause)
    assert 0.05 <= pauses[0] <= 0.1 and 5 <= pauses[-1] <= 10
    await ask(replicas, "r")
    await fail(replicas, "r", "down")
    assert a.pause <= 0.1


@in_virtual_time
async def test_what_was_sent_before_a_failure_says_nothing_new():
    replica = Replica("a", SERVICE, 8)
    first, second, third = await granted(turns(replica, 3))
    replica.failed(first, ReplicaError("busy", "busy", 20.0))
    replica.failed(second, ReplicaError("down", "down", 50.0))
    replica.answered(third)
    assert 19 < replica.pause <= 20 and not replica.down


@in_virtual_time
async def test_rows_that_wait_go_to_the_first_server_that_serves_again():
    replicas = servers("a", "b")
    homes = {row: await ask(replicas, row) for row in ("r0", "r1", "r2", "r3")}
    of_a, of_b = ([row for row, home in homes.items() if home == name] for name in "ab")
    await fail(replicas, of_a[0], "down", retry_after=60.0)
    await fail(replicas, of_b[0], "down", retry_after=0.5)
    begin = time.monotonic()
    assert {await ask(replicas, row) for row in homes} == {"b"}
    assert time.monotonic() < begin + 1


@in_virtual_time
async def test_a_server_that_joins_takes_the_rows_that_wait():
    replicas = servers("a")
    await fail(replicas, "r", "down", retry_after=50.0)
    waiting = asyncio.ensure_future(ask(replicas, "r"))
    await asyncio.sleep(1)
    replicas.change([*replicas, Replica("b", SERVICE, 8)])
    assert await waiting == "b"


@in_virtual_time
async def test_a_server_that_left_finishes_what_it_has_and_gets_nothing_more():
    replicas = servers("a", most=1)
    (a,) = replicas
    async with replicas.turn("r") as turn:
        waiting = asyncio.ensure_future(ask(replicas, "s"))
        await asyncio.sleep(1)
        replicas.change([Replica("b", SERVICE, 1)])
        assert turn.url == "a" and await waiting == "b"
    assert await ask(replicas, "r") == "b" and not a.pause


# --- outages


@in_virtual_time
async def test_rows_wait_for_servers_that_are_all_down_until_the_outage_lasts_too_long():
    replicas, failures = servers("a", "b", outage_seconds=100.0), []

    async def write(row):
        while True:
            try:
                await ask(replicas, row, ReplicaError("no one is there", "down"))
            except ReplicaError as error:
                failures.append(str(error))
                if replicas.given_up:
                    return time.monotonic()

    begin = time.monotonic()
    ended = await asyncio.gather(*(write(f"r{i}") for i in range(200)))
    assert begin + 85 <= min(ended) <= max(ended) <= begin + 100 and max(ended) - min(ended) < 1e-3
    assert set(failures) == {"no one is there"}
    assert len(failures) < 2 * 200 + 2 * 50  # each row fails at first and at last; between, one probes for all


@pytest.mark.parametrize("event", ["an answer", "a new server", "nothing asked"])
def test_an_outage_ends_with(event):
    async def test():
        replicas = servers("a", outage_seconds=10.0)
        await fail(replicas, "r", "busy", retry_after=9.0)
        await asyncio.sleep(9.5)
        assert not replicas.given_up
        if event == "an answer":
            await ask(replicas, "r")
        elif event == "a new server":
            replicas.change([*replicas, Replica("b", SERVICE, 8)])
        else:
            await asyncio.sleep(1000)
            replicas.idle()
        await fail(replicas, "r", "busy", retry_after=9.0)
        assert not replicas.given_up

    virtual_time.run(test())


@in_virtual_time
async def test_there_is_no_outage_while_one_server_has_not_failed():
    """It may just take long for what it was asked."""
    replicas = servers("a", "b", outage_seconds=10.0)
    await fail(replicas, "r", "down")
    async with replicas.turn("r"):
        await asyncio.sleep(1000)
        assert not replicas.given_up and not all(each.down for each in replicas)


@in_virtual_time
async def test_other_errors_count_neither_as_answers_nor_as_failures_of_the_server():
    replicas = servers("a")
    with pytest.raises(EngineDeadError):
        await ask(replicas, "r", EngineDeadError("the key"))
    assert not replicas.answered_at and not any(each.down for each in replicas)


def test_caches_are_added_up_where_all_servers_tell_theirs():
    replicas = Replicas(1.0)
    assert replicas.cache_tokens is None
    replicas.change([Replica("a", SERVICE, 1), Replica("b", SERVICE, 1)])
    assert replicas.cache_tokens == 2000 and replicas.exact
    silent = Service("text", exact=False, context_length=2048, cache_tokens=None)
    replicas.change([*replicas, Replica("c", silent, 1)])
    assert replicas.cache_tokens is None and not replicas.exact
