import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from tessy_hf import demo
from tessy_hf.engines.generation import Generator, read_first
from tests.engines.contract import request


@pytest.fixture(scope="module")
def network():
    return AutoModelForCausalLM.from_pretrained(demo.STUDENT).eval()


@pytest.fixture
def generator(network):
    return Generator(network)


@pytest.fixture
def shapes(network, generator):
    """The shapes of ids that the network read."""
    shapes = []

    def note(module, args, inputs):
        shapes.append(tuple(inputs["input_ids"].shape))

    handle = network.register_forward_pre_hook(note, with_kwargs=True)
    yield shapes
    handle.remove()


def test_a_continued_row_reads_only_what_is_new(generator, shapes):
    first = request(tokens=4)
    (written,) = generator.generate([first])
    (rest,) = generator.generate([request(ids=[*first.prompt_ids, *written.token_ids], tokens=4)])
    # The fourth token's keys were not computed yet: one id to read.
    assert shapes == [(1, len(first.prompt_ids)), *[(1, 1)] * 7]
    assert (written.uncached_prompt_tokens, rest.uncached_prompt_tokens) == (len(first.prompt_ids), 1)


def test_a_released_row_is_read_anew(generator):
    asked = request(tokens=4)
    generator.generate([asked])
    (again,) = generator.generate([asked], released=[asked.row])
    assert again.uncached_prompt_tokens == len(asked.prompt_ids)


def test_rows_that_end_early_do_not_disturb_the_others(generator):
    alone = [generator.generate([request(f"alone {n}", prompt=n, tokens=n)])[0] for n in (1, 4, 9)]
    together = generator.generate([request(f"{n}", prompt=n, tokens=n) for n in (1, 4, 9)])
    assert [list(c.token_ids) for c in together] == [list(c.token_ids) for c in alone]
    assert [len(c.token_ids) for c in together] == [1, 4, 9]


def test_long_prompts_are_read_before_rows_that_go_on_join_them(generator, shapes):
    def ask(*requests):
        return [list(completion.token_ids) for completion in generator.generate(requests)]

    short = [request(f"short {i}", prompt=i, tokens=2) for i in range(6)]
    going = [
        request(row.row, ids=[*row.prompt_ids, *ids], tokens=2) for row, ids in zip(short, ask(*short), strict=True)
    ]
    long = [request(f"long {i}", ids=[*[300 + i] * (400 + i), *request().prompt_ids], tokens=3) for i in range(2)]
    alone = [ask(request(f"alone {i}", ids=asked.prompt_ids, tokens=asked.max_tokens))[0]
             for i, asked in enumerate([*going, *long])]  # fmt: skip
    shapes.clear()
    together = generator.generate([*going, *long])
    assert shapes[:2] == [(2, len(long[1].prompt_ids) - 1), (8, 1)]
    assert [list(completion.token_ids) for completion in together] == alone
    assert [c.uncached_prompt_tokens for c in together] == [*[1] * 6, *(len(asked.prompt_ids) for asked in long)]


def test_rows_are_read_first_where_that_spares_more_than_a_pass():
    def first(*unread):
        return sorted(read_first(np.array(unread)).tolist())

    assert first(3, 800, 5, 700, 4) == [1, 3]
    assert first(3, 60, 5, 50, 4) == []  # not worth a pass
    assert first(800, 800, 800) == [] and first(5000) == []  # nobody to wait for them
    assert first(3000, *[300] * 10, *[2] * 50) == [0] and first(1, *[300] * 10, *[2] * 50) == list(range(1, 11))
