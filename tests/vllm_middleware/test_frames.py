"""The protocol of deltas: whatever becomes of frames, a prompt that is used is the one that was meant."""

import asyncio
from array import array

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from tessy_hf.vllm_middleware.frames import (
    BLOCK,
    MESSAGE_BYTES,
    ROW_BYTES,
    TOKEN_BYTES,
    Ask,
    HashedIds,
    Piece,
    Rows,
    SendQueue,
    join,
    split,
)

IDS = st.lists(st.integers(0, 9), max_size=6).flatmap(
    lambda few: st.sampled_from([few, few * 50, few * (BLOCK // 2)])  # so that blocks are filled now and then
)


def ask(known, ids, slot=0):
    """Return the frame of a request for a prompt, of a client that has sent what is known."""
    begin = known.common(ids)
    known.replace(begin, ids[begin:])
    return Ask(7, 1, 5, -1, 3, False, slot, begin, known.checksum(), array("i", ids[begin:])).encode()


class Network(RuleBasedStateMachine):
    """A client and a server between which frames are lost, repeated and reordered, and either forgets what it knew."""

    def __init__(self):
        super().__init__()
        self.server, self.known, self.rows, self.sent = Rows(10**9), {}, {}, []

    @rule(slot=st.integers(0, 2), cut=st.integers(0, 400), more=IDS)
    def write(self, slot, cut, more):
        """A row is cut back at its end, goes on, and is asked for."""
        row = self.rows.get(slot, [])
        self.rows[slot] = row = row[: max(0, len(row) - cut)] + more
        self.sent.append((slot, list(row), ask(self.known.setdefault(slot, HashedIds()), row, slot)))

    @rule(at=st.integers(0, 10**6), repeat=st.booleans(), who=st.sampled_from(["a", "a", "a", "b"]))
    def arrive(self, at, repeat, who):
        """One of the frames arrives, once or more; at times on another client's connection."""
        if self.sent:
            at %= len(self.sent)
            _, meant, frame = self.sent[at] if repeat else self.sent.pop(at)
            used = self.server.prompt(who, Ask.decode(frame))
            assert used is None or used == meant

    @rule(slot=st.integers(0, 2))
    def resend(self, slot):
        """What is sent whole is understood, whatever came before."""
        meant = self.rows.get(slot, [])
        self.known[slot] = HashedIds()
        assert self.server.prompt("a", Ask.decode(ask(self.known[slot], meant, slot))) == meant

    @rule(slot=st.integers(0, 2))
    def reuse(self, slot):
        """Another row gets the slot."""
        self.known.pop(slot, None)
        self.rows.pop(slot, None)

    @rule()
    def restart(self):
        self.server = Rows(10**9)

    @rule(most=st.integers(1, 5000))
    def evict(self, most):
        self.server = Rows(most)


TestNetwork = Network.TestCase
TestNetwork.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


@given(st.lists(st.tuples(st.integers(0, 600), IDS), max_size=8))
def test_the_checksum_depends_on_the_ids_alone(changes):
    grown, ids = HashedIds(), []
    for cut, more in changes:
        ids = ids[: max(0, len(ids) - cut)] + more
        grown.replace(grown.common(ids), ids[grown.common(ids) :])
        fresh = HashedIds()
        fresh.replace(0, ids)
        assert grown.ids.tolist() == ids and grown.checksum() == fresh.checksum()


def test_rows_asked_for_longest_ago_are_forgotten_beyond_the_bound():
    row = ROW_BYTES + 100 * TOKEN_BYTES
    rows, known = Rows(3 * row), {slot: HashedIds() for slot in range(4)}
    prompts = {slot: [slot] * 100 for slot in known}
    for slot in (0, 1, 2, 0, 3):
        assert rows.prompt("a", Ask.decode(ask(known[slot], prompts[slot], slot))) == prompts[slot]
    again = {slot: rows.prompt("a", Ask.decode(ask(known[slot], prompts[slot], slot))) for slot in (0, 2, 3, 1)}
    assert again == {0: prompts[0], 1: None, 2: prompts[2], 3: prompts[3]}


def test_a_prompt_that_was_handed_out_does_not_change():
    rows, known = Rows(10**9), HashedIds()
    first = rows.prompt("a", Ask.decode(ask(known, [1, 2, 3])))
    rows.prompt("a", Ask.decode(ask(known, [1, 2, 4, 5])))
    assert first == [1, 2, 3]


def test_frames_are_read_as_they_were_written():
    sent = Ask(2**31, 65535, 5, -1, -(2**40), True, 9, 0, b"12345678", array("i", [1, 150_000]))
    assert Ask.decode(sent.encode()) == sent
    assert Piece.decode(Piece(3, 1, 9, -1, [5, 6]).encode()) == Piece(3, 1, 9, -1, [5, 6])


@given(st.lists(st.binary(max_size=9), max_size=5), st.integers(1, 9))
def test_a_message_has_the_frames_that_were_joined_and_one_that_is_cut_off_is_refused(frames, cut):
    message = join(frames)
    assert split(message) == frames
    try:
        assert split(message[:-cut]) == frames[: len(split(message[:-cut]))]
    except ValueError as error:
        assert "is cut off after" in str(error)


@given(st.lists(st.integers(0, 2 * MESSAGE_BYTES), max_size=8))
@settings(max_examples=30, deadline=None)
def test_messages_are_bounded_and_their_frames_whole_and_in_order(lengths):
    frames, sent = [bytes([number]) * length for number, length in enumerate(lengths)], []

    async def send(message):
        sent.append(split(message))

    async def put():
        queue = SendQueue(send)
        for frame in frames:
            queue.put(frame)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(put())
    assert [frame for message in sent for frame in message] == frames
    assert all(len(message) == 1 or sum(map(len, message)) <= MESSAGE_BYTES for message in sent)
    together = [sum(map(len, [*message, after[0]])) for message, after in zip(sent, sent[1:], strict=False)]
    assert all(size > MESSAGE_BYTES for size in together)


def test_frames_of_one_turn_of_the_event_loop_go_out_as_one_message_in_order():
    sent = []

    async def send(message):
        sent.append(split(message))
        if len(sent) == 1:
            queue.put(b"3")  # while a message is under way
            await asyncio.sleep(0)

    async def put():
        queue.put(b"1")
        queue.put(b"2")
        await asyncio.sleep(0.01)
        queue.put(b"4")
        await asyncio.sleep(0.01)
        queue.put(b"5")
        queue.close()
        queue.put(b"6")
        await asyncio.sleep(0.01)

    queue = SendQueue(send)
    asyncio.run(put())
    assert sent == [[b"1", b"2"], [b"3"], [b"4"]]
