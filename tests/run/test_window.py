"""As many rows are in flight as the caches hold; where they overflow, fewer."""

import asyncio
import dataclasses
import re
from functools import partial
from random import Random
from types import SimpleNamespace

import pytest
from datasets import Dataset

from tessy_hf import Script, ScriptedEngine, Speaker, TessyTransform, demo
from tessy_hf.boundary.predictor import BoundaryPredictor
from tessy_hf.run.runner import RUNS
from tessy_hf.run.window import MOST_ROWS, ROWS, Window


def window(*caches):
    made = Window("auto", 1000)
    made.open(*(SimpleNamespace(cache_tokens=cache) for cache in (*caches, None)))
    return made


def test_a_fixed_window_lets_in_so_many_rows_and_the_next_when_one_leaves():
    async def use():
        rows = Window(2, 1000)
        await rows.enter()
        await rows.enter()
        third = asyncio.create_task(rows.enter())
        await asyncio.sleep(0)
        assert not third.done() and rows.reason == ""
        rows.leave()
        await third
        assert rows.rows == rows.limit == 2

    asyncio.run(use())


def test_the_smaller_cache_decides_and_a_cache_of_unknown_size_does_not():
    both = window(100_000, 50_000)
    assert both.limit == 45 and window(50_000).limit == 45
    assert window(None).limit == ROWS
    assert window(10).limit == 1 and window(10**12).limit == MOST_ROWS
    assert both.reason == " of 45 (cache: 50,000 tokens; a row: 1,000)"
    assert window(None).reason == f" of {ROWS} (cache: size unknown; a row: 1,000)"


def test_the_lengths_of_finished_rows_replace_the_guess():
    rows = window(100_000)
    assert rows.limit == 90
    for _ in range(1000):
        rows.learn(250, 0)
    assert 340 < rows.limit <= 360
    for _ in range(100_000):
        rows.learn(10_000, 0)
    assert rows.limit == 9


def test_few_long_rows_among_many_short_ones_count_for_the_time_they_are_in_flight():
    rows = window(1_000_000)
    for _ in range(500):
        for tokens in (*[100] * 9, 9_100):
            rows.learn(tokens, 0)
    assert 4_000 < rows.row_tokens < 5_000  # though the mean is 1,000


def test_the_window_closes_while_rows_are_recomputed_and_opens_slowly_after():
    rows = window(100_000)
    rows.learn(1000, 50)
    assert rows.limit == 90  # as much is tolerated
    for ended in range(5):
        rows.learn(1000, 5000 * (ended + 1))
    closed = rows.limit
    assert closed < 0.4 * 90 and "33% used as it overflowed" in rows.reason
    rows.learn(1000, 25_000)
    assert closed <= rows.limit <= closed + 1
    for _ in range(60):
        rows.learn(1000, 25_000)
    assert rows.limit == 90


def test_the_window_does_not_close_again_before_it_has_emptied_to_what_it_closed_to():
    async def use():
        rows = window(100_000)
        for _ in range(90):
            await rows.enter()
        limits = []
        for ended in range(34):
            rows.learn(1000, 5000 * (ended + 1))
            rows.leave()
            limits.append(rows.limit)
        assert limits == [72] * 18 + [57] * 15 + [46]

    asyncio.run(use())


class SmallCache(ScriptedEngine):
    """A scripted engine that keeps the least recently used rows only as long as its cache holds them."""

    def __init__(self, *given, tokens, holds, **options):
        super().__init__(*given, **options)
        self.tokens, self.holds, self.kept = tokens, holds, {}

    @property
    def cache_tokens(self):
        return self.tokens

    async def complete(self, request):
        await asyncio.sleep(0)
        held = self.kept.pop(request.row, 0)
        read = max(0, len(request.prompt_ids) - held)
        self.kept[request.row] = len(request.prompt_ids)
        while sum(self.kept.values()) > self.holds:
            self.kept.pop(next(iter(self.kept)))
        return dataclasses.replace(await super().complete(request), uncached_prompt_tokens=read)

    def release(self, row):
        self.kept.pop(row, None)
        super().release(row)


class Words(BoundaryPredictor):
    """Knows style by the word: what is neither a digit nor a sign."""

    async def labels(self, window, since=0):
        return [self.vocabulary.decode([token]).strip().isalpha() for token in window[since:]]


def script(author, key):
    """Return spans of an author's own kind, each with some of the other's behind it."""
    draw = Random(f"{author} {key}")

    def span(style):
        return " ".join(draw.choices("okay so wait then yes is right".split() if style else "123456789", k=8))

    return Script([f" {span(author == 'student')} {span(author == 'teacher')}" for _ in range(60)], "done")


@pytest.mark.slow
@pytest.mark.parametrize("lie", [1, 4])
def test_a_run_keeps_to_the_cache_even_where_it_is_smaller_than_told(lie):
    """``lie``: how many times smaller."""
    most = [0]

    class Engine(SmallCache):
        async def complete(self, request):
            *_, run = RUNS.values()
            most[0] = max(most[0], run.window.rows)
            return await super().complete(request)

    words = Words(str(demo.BOUNDARY_STUDENT))
    speakers = {
        author: Speaker(Engine(partial(script, author), name=author, tokens=10_000, holds=10_000 // lie), words)
        for author in ("teacher", "student")
    }
    prompts = Dataset.from_dict({"id": [str(i) for i in range(24)], "prompt": ["go on"] * 24})
    settings = {"id_column": "id", "journal": None, "max_thinking_tokens": 3_500, "max_answer_tokens": 100}
    with TessyTransform(**speakers, **settings, rows_in_flight="auto", chunk_tokens=16) as transform:
        written = list(prompts.map(transform, batched=True, batch_size=10, load_from_cache_file=False))
        *_, run = RUNS.values()
        lost, window = run.meter.recomputed_tokens, run.window
    assert {row["finish_reason"] for row in written} == {"stop"}
    assert all(900 < row["teacher_tokens"] + row["student_tokens"] < 1100 for row in written)
    assert re.fullmatch(r" of \d+ \(cache: 10,000 tokens.*; a row: (9|1,0)\d\d\)", window.reason)
    assert most[0] == 10
    assert (lost == 0 and window.limit in (8, 9, 10)) if lie == 1 else (lost > 0 and window.limit < 6)


@pytest.mark.slow
def test_rows_do_not_depend_on_the_window():
    prompts = demo.prompts(4, seed=3)

    def rows(**settings):
        with demo.transform(journal=None, temperature=0, **settings) as transform:
            written = list(prompts.map(transform, batched=True, load_from_cache_file=False))
            return transform.run_fingerprint, written

    assert rows(rows_in_flight="auto") == rows(rows_in_flight=3)
