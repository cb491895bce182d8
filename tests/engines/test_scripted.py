import asyncio
import math
from array import array
from functools import lru_cache

import pytest

from tessy_hf import Script, ScriptedEngine
from tessy_hf.errors import RequestError
from tests.engines.contract import TOKENIZER, VOCABULARY, LikelihoodContract, network, reference, request

TEXT = "okay so 1 + 1 = 2 and that is how it goes when one counts with care from one to the next number"


def same_text(row):
    return Script(TEXT)


@lru_cache(maxsize=1024)
def distribution(before):
    import torch

    with torch.inference_mode():
        return network()(torch.tensor([array("i", before).tolist()])).logits[0, -1].double().softmax(-1).tolist()


def probability(before, token):
    """How likely the miniature student finds an id."""
    return distribution(before.tobytes())[token]


class TestScriptedEngine(LikelihoodContract):
    times = 1

    @staticmethod
    def make():
        return ScriptedEngine(same_text, probability=probability)

    @staticmethod
    def reference(prompt_ids, ids):
        """The student's log-probabilities; ranks and entropies are those of other ids that share the rest evenly."""
        logprobs, _, _ = reference(prompt_ids, ids)
        count, found = len(TOKENIZER), list(map(math.exp, logprobs))
        rest = [(1 - one) / (count - 1) for one in found]
        ranks = [1 if one >= other else 2 for one, other in zip(found, rest, strict=True)]
        each = zip(found, rest, strict=True)
        return logprobs, ranks, [-one * math.log(one) - (count - 1) * other * math.log(other) for one, other in each]


def test_without_probabilities_it_measures_nothing():
    assert ScriptedEngine(same_text).measures == frozenset()


def texts(script, *turns):
    """Play turns: each says up to where the last chunk is kept, and what another author adds."""
    engine = ScriptedEngine({"r": script})

    async def session():
        await engine.start()
        ids = list(request().prompt_ids)
        written = []
        for kept, added in [*turns, (0, "")]:
            completion = await engine.complete(request("r", ids=ids, tokens=6))
            text = VOCABULARY.decode(completion.token_ids)
            written.append(text)
            ids += VOCABULARY.encode(text[: text.find(kept) + len(kept)] if kept else "").ids
            ids += VOCABULARY.encode(added).ids
        return written

    return asyncio.run(session())


def test_goes_on_after_what_was_kept():
    first, second = texts("okay so 1 + 1 = 2 wait", ("okay so", " 5 + 5 = 0"))
    assert first.startswith("okay so 1 + 1")
    assert second.startswith(" 1 + 1 = 2")


def test_a_list_gives_each_turn_its_text_and_writes_on_into_the_next():
    first, second = texts(["okay so", " hmm now", " wait"], ("okay so", " 5 + 5 = 0"))
    assert first == "okay so hmm now wait"
    assert second == " hmm now wait"


def test_goes_on_from_the_last_whole_word_that_was_kept():
    first, second = texts("okay so 1 + 1 = 2", ("okay s", ""))
    assert first.startswith("okay so")
    assert second.startswith(" so 1")


def test_faults_latencies_and_unknown_rows():
    slow = ScriptedEngine({"a": "x"}, latency=lambda request: 0.01, fault=lambda request: OSError("cut"))
    fine = ScriptedEngine({"a": "x"})

    async def session():
        await slow.start()
        await fine.start()
        with pytest.raises(OSError, match="cut"):
            await slow.complete(request("a"))
        with pytest.raises(RequestError, match="no script for row 'b'"):
            await fine.complete(request("b"))
        return await asyncio.wait_for(fine.complete(request("a")), 5)

    assert asyncio.run(session()).stop_id is not None
    assert slow.requests == 1
