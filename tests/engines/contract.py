"""What every engine must do. An engine's test class inherits one of these and says with ``make`` how it is made.

Engines that run a model run the miniature student, so that greedy texts are comparable between engines. One engine is
started per class: real ones take their time.
"""

import asyncio
import pickle
from array import array
from contextlib import aclosing
from dataclasses import replace
from functools import cache

import pytest
from transformers import AutoTokenizer

from tessy_hf import demo
from tessy_hf.engines.base import Request
from tessy_hf.text.vocabulary import Vocabulary

TOKENIZER = AutoTokenizer.from_pretrained(demo.STUDENT)
VOCABULARY = Vocabulary(TOKENIZER, "student")
STOP_IDS = VOCABULARY.special_ids | {VOCABULARY.token_id("</think>")}


def request(
    row="r",
    *,
    prompt=0,
    ids=None,
    tokens=8,
    temperature=0.0,
    seed=0,
    order=0,
    stop_ids=STOP_IDS,
    top_p=1.0,
    **sampling,
):
    """Ask for the beginning of a row's thinking, or to go on after ``ids``."""
    text = f"<|im_start|>user\ncalc {prompt} + 1 + 2<|im_end|>\n<|im_start|>assistant\n<think>\n"
    return Request(
        row=row,
        order=order,
        part="thinking",
        prompt_ids=array("i", VOCABULARY.encode_template(text) if ids is None else ids),
        max_tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        stop_ids=stop_ids,
        **sampling,
    )


@cache
def network():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo.STUDENT).eval()


def reference(prompt_ids, ids):
    """The miniature student's own log-probabilities, ranks and entropies of ids after a prompt."""
    import torch

    with torch.inference_mode():
        logits = network()(torch.tensor([[*prompt_ids, *ids]])).logits[0, len(prompt_ids) - 1 : -1]
    scores = logits.double().log_softmax(-1)
    own = scores.gather(-1, torch.tensor(ids)[:, None])
    return own[:, 0].tolist(), (scores >= own).sum(-1).tolist(), (-scores.exp() * scores).sum(-1).tolist()


class EngineContract:
    """For every engine. ``streams`` says whether it can be asked for streams."""

    streams = True
    knows_its_cache = False
    measures = frozenset()
    fewest_pieces = 2  # of a stream of 120 tokens; of servers, what arrives at once is one piece

    @staticmethod
    def make():
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def loop(cls):
        loop = asyncio.new_event_loop()
        yield loop
        loop.close()

    @pytest.fixture(scope="class")
    @classmethod
    def live(cls, loop):
        engine = cls.make()
        loop.run_until_complete(engine.start())
        yield engine
        loop.run_until_complete(engine.close())

    @pytest.fixture
    def ask(self, live, loop):
        """Send requests at the same time; what was asked of rows in one test is forgotten in the next."""
        rows = set()

        def ask(*requests):
            rows.update(r.row for r in requests)

            async def together():
                return await asyncio.wait_for(asyncio.gather(*map(live.complete, requests)), 120)

            return loop.run_until_complete(together())

        yield ask
        for row in rows:
            live.release(row)

    def test_describes_itself_before_it_is_started(self):
        engine = self.make()
        assert engine.model and engine.identity["engine"]
        assert engine.tokenizer.get_vocab() == TOKENIZER.get_vocab()

    def test_gives_at_most_the_tokens_asked_for(self, ask):
        (completion,) = ask(request(tokens=5))
        assert len(completion.token_ids) == 5 and completion.stop_id is None
        assert all(isinstance(token, int) for token in completion.token_ids)

    def test_stops_at_a_stop_id_and_leaves_it_out(self, ask):
        (completion,) = ask(request(tokens=120))
        assert completion.stop_id in STOP_IDS
        assert not set(completion.token_ids) & STOP_IDS

    def test_a_text_taken_in_chunks_is_the_text_taken_at_once(self, ask):
        (whole,) = ask(request("whole", tokens=16))
        ids = request().prompt_ids
        begin = len(ids)
        for _ in range(4):
            (part,) = ask(request("parts", ids=ids, tokens=4))
            ids = array("i", [*ids, *part.token_ids])
        assert list(ids[begin:]) == list(whole.token_ids)

    @pytest.fixture
    def stream(self, live, loop):
        """Read streams side by side, of each at most some pieces."""
        assert live.streams == self.streams
        if not self.streams:
            pytest.skip("This way of asking has no streams.")
        rows = set()

        async def read(asked, most):
            pieces = []
            async with aclosing(live.stream(asked)) as stream:
                while len(pieces) < most and (piece := await anext(stream, None)) is not None:
                    assert len(piece.token_ids) or piece.stop_id is not None
                    pieces.append(replace(piece, token_ids=list(piece.token_ids), uncached_prompt_tokens=None))
            return pieces

        def together(*requests, most=1000):
            rows.update(r.row for r in requests)

            async def all_of_them():
                return await asyncio.wait_for(asyncio.gather(*(read(asked, most) for asked in requests)), 120)

            return loop.run_until_complete(all_of_them())

        yield together
        for row in rows:
            live.release(row)

    def test_a_stream_is_the_text_taken_at_once(self, ask, stream):
        requests = [request(f"r{i}", prompt=i, tokens=tokens) for i, tokens in enumerate((1, 16, 120))]
        streamed = stream(*requests)
        for pieces, whole in zip(streamed, ask(*requests), strict=True):
            assert [i for piece in pieces for i in piece.token_ids] == list(whole.token_ids)
            assert [piece.stop_id for piece in pieces] == [None] * (len(pieces) - 1) + [whole.stop_id]
        assert len(streamed[2]) >= self.fewest_pieces

    def test_a_row_goes_on_where_its_stream_was_broken_off(self, ask, stream):
        (whole,) = ask(request("whole", tokens=120))
        for _ in range(3):
            ((piece,),) = stream(request("r", tokens=120), most=1)
            begun = array("i", [*request().prompt_ids, *piece.token_ids])
            (rest,) = ask(request("r", ids=begun, tokens=120 - len(piece.token_ids)))
            assert [*piece.token_ids, *rest.token_ids] == list(whole.token_ids)

    def test_rows_do_not_depend_on_their_company(self, ask):
        alone = [ask(request(f"alone{i}", prompt=i))[0] for i in range(3)]
        together = ask(*(request(f"together{i}", prompt=i, order=i) for i in range(3)))
        assert [list(c.token_ids) for c in alone] == [list(c.token_ids) for c in together]

    def test_says_how_long_its_context_is(self, live):
        assert live.context_length > 100
        assert (live.cache_tokens is not None) == self.knows_its_cache
        assert live.cache_tokens is None or live.cache_tokens > live.context_length

    def test_says_what_it_measures(self, live):
        assert live.measures == self.measures

    def test_is_pickled_by_its_description_while_live(self, live):
        assert pickle.loads(pickle.dumps(live)).identity == live.identity

    def test_can_be_closed_and_started_again(self, loop):
        async def twice():
            texts = []
            for _ in range(2):
                await engine.start()
                await engine.start()
                texts.append(list((await engine.complete(request())).token_ids))
                await engine.close()
                await engine.close()
            return texts

        engine = self.make()
        first, second = loop.run_until_complete(twice())
        assert first == second


class LikelihoodContract(EngineContract):
    """For engines that measure how likely ids are, as the miniature student finds them."""

    measures = frozenset({"logprobs", "entropies", "score"})
    reference = staticmethod(reference)
    times = 20  # how long the longest text is that is scored

    def test_log_probabilities_are_those_of_the_model_itself_however_tokens_are_drawn(self, ask, stream):
        if "logprobs" not in self.measures:
            pytest.skip("This way of asking gives none.")
        wanted = {"tokens": 60, "logprobs": True, "entropies": "entropies" in self.measures}
        hot = {"temperature": 1.3, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1, "seed": 3}
        requests = [request("greedy", **wanted), request("drawn", prompt=1, **hot, **wanted), request("plain")]
        *measured, plain = ask(*requests)
        assert plain.logprobs is plain.entropies is None
        pieces = stream(request("streamed", **wanted))[0]
        streamed = [value for piece in pieces for value in piece.logprobs]
        assert streamed == pytest.approx(list(measured[0].logprobs), abs=1e-3)
        for asked, completion in zip(requests, measured, strict=False):
            logprobs, _, entropies = self.reference(asked.prompt_ids, list(completion.token_ids))
            assert list(completion.logprobs) == pytest.approx(logprobs, abs=1e-3)
            if wanted["entropies"]:
                assert list(completion.entropies) == pytest.approx(entropies, abs=1e-3)
            else:
                assert completion.entropies is None

    def test_scores_of_given_ids_are_those_of_the_model_itself(self, ask, live, loop):
        if "score" not in self.measures:
            pytest.skip("This way of asking has no scores.")
        prompt = request().prompt_ids
        text = VOCABULARY.encode("okay so 1 + 2 = 3 and then 7 + 1 = 8 , wait").ids * self.times
        grown = [text[:3], text[:9], text[:9], text[3:], text]  # of a row that is cached further and further
        (written,) = ask(request("r", tokens=20))
        every = [(prompt, ids) for ids in grown] + [([*prompt, *written.token_ids], text[:2])]

        async def score():
            alone = [await live.score(before, ids, row="r") for before, ids in every]
            return alone, await asyncio.gather(*(live.score(*one, row=f"s{at}") for at, one in enumerate(every)))

        for scored in loop.run_until_complete(score()):
            for (before, ids), told in zip(every, scored, strict=True):
                logprobs, ranks, _ = self.reference(before, ids)
                assert told.logprobs == pytest.approx(logprobs, abs=1e-3)
                assert told.ranks == ranks
        (again,) = ask(request("r", tokens=20))
        assert list(again.token_ids) == list(written.token_ids)


class ModelContract(LikelihoodContract):
    """For engines that run a model: they read their prompt, and draw by the seed."""

    def test_goes_on_after_foreign_ids(self, ask, live):
        """What was rolled back is forgotten, what the other author wrote is read."""
        first = request("a")
        (written,) = ask(first)
        ids = [*first.prompt_ids, *written.token_ids[:2], *VOCABULARY.encode(" 7 + 1 = 8").ids]
        (warm,) = ask(request("a", ids=ids))
        (cold,) = ask(request("b", ids=ids))
        live.release("a")
        (again,) = ask(request("a", ids=ids))
        assert list(warm.token_ids) == list(cold.token_ids) == list(again.token_ids)
        assert list(warm.token_ids) != list(written.token_ids)

    def test_a_seed_repeats_itself_and_another_does_not(self, ask):
        drawn = ask(*(request(f"r{i}", tokens=24, temperature=1.5, seed=s) for i, s in enumerate((1, 1, 2))))
        first, same, other = (list(c.token_ids) for c in drawn)
        assert first == same != other

    @pytest.mark.parametrize("restriction", [{"top_k": 1}, {"min_p": 1.0}])
    def test_the_one_token_that_is_left_is_the_greedy_one(self, ask, restriction):
        hot = (request(f"{s}", tokens=24, temperature=1.5, seed=s, **restriction) for s in range(3))
        greedy, *drawn = ask(request("greedy", tokens=24), *hot)
        assert [list(completion.token_ids) for completion in drawn] == [list(greedy.token_ids)] * 3

    def test_a_penalty_keeps_tokens_from_coming_again_however_the_text_is_cut(self, ask):
        """What was asked before counts as text of the row: it is in the next request's prompt."""
        free = {"tokens": 12, "stop_ids": frozenset(), "repetition_penalty": 50.0}
        (plain,) = ask(request("plain", tokens=40, stop_ids=frozenset()))
        assert len(set(plain.token_ids)) < len(plain.token_ids)
        (whole,) = ask(request("whole", **free))
        assert len(set(whole.token_ids)) == len(whole.token_ids)
        begun = array("i", [*request().prompt_ids, *whole.token_ids[:5]])
        (rest,) = ask(request("cut", ids=begun, **{**free, "tokens": 7}))
        assert list(rest.token_ids) == list(whole.token_ids[5:])

    def test_greedy_text_is_that_of_generate(self, ask):
        import torch
        from transformers import AutoModelForCausalLM

        requests = [request(str(i), prompt=i, tokens=12) for i in range(4)]
        model = AutoModelForCausalLM.from_pretrained(demo.STUDENT).eval()
        for asked, completion in zip(requests, ask(*requests), strict=True):
            ids = torch.tensor([list(asked.prompt_ids)])
            expected = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None
            )
            assert list(completion.token_ids) == expected[0, ids.shape[1] :].tolist()
