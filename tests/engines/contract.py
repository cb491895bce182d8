"""What every engine must do. Each engine's test file inherits :class:`EngineContract` and provides ``engine``.

The engine under test runs the miniature student, so that greedy texts are comparable between engines.
"""

import asyncio
from array import array

from tessy_hf import demo
from tessy_hf.engines.base import Request
from tessy_hf.vocabulary import Vocabulary


def run(coroutine):
    return asyncio.run(coroutine)


class EngineContract:
    """Subclasses define a fixture ``engine`` that returns an engine which was not started."""

    def request(self, engine, *, row="r", prompt=0, ids=None, tokens=8, temperature=0.0, seed=0, order=0, stop=None):
        vocabulary = Vocabulary(engine.tokenizer, "student")
        text = f"<|im_start|>user\ncalc {prompt} + 1 + 2<|im_end|>\n<|im_start|>assistant\n<think>\n"
        return Request(
            row=row,
            order=order,
            part="thinking",
            prompt_ids=array("i", vocabulary.encode_template(text) if ids is None else ids),
            max_tokens=tokens,
            temperature=temperature,
            top_p=1.0,
            seed=seed,
            stop_ids=vocabulary.special_ids | {vocabulary.token_id("</think>")} if stop is None else stop,
        )

    def complete(self, engine, *requests):
        async def session():
            await engine.start()
            try:
                return await asyncio.gather(*(engine.complete(request) for request in requests))
            finally:
                await engine.close()

        return run(session())

    def test_describes_itself_before_it_is_started(self, engine):
        assert engine.model and engine.identity["engine"]
        assert engine.tokenizer.eos_token_id is not None

    def test_gives_at_most_the_tokens_asked_for(self, engine):
        (completion,) = self.complete(engine, self.request(engine, tokens=5))
        assert len(completion.token_ids) == 5 and completion.stop_id is None
        assert all(isinstance(token, int) for token in completion.token_ids)

    def test_stops_at_a_stop_id_and_leaves_it_out(self, engine):
        request = self.request(engine, tokens=120)
        (completion,) = self.complete(engine, request)
        assert completion.stop_id in request.stop_ids
        assert not set(completion.token_ids) & request.stop_ids

    def test_a_text_taken_in_chunks_is_the_text_taken_at_once(self, engine):
        async def session():
            await engine.start()
            try:
                whole = await engine.complete(self.request(engine, row="whole", tokens=16))
                request = self.request(engine, row="parts", tokens=4)
                ids, parts = request.prompt_ids, []
                for _ in range(4):
                    part = await engine.complete(self.request(engine, row="parts", ids=ids, tokens=4))
                    parts.extend(part.token_ids)
                    ids = array("i", [*ids, *part.token_ids])
                return list(whole.token_ids), parts
            finally:
                await engine.close()

        whole, parts = run(session())
        assert whole == parts

    def test_rows_do_not_depend_on_their_company(self, engine):
        alone = [self.complete(engine, self.request(engine, row=f"r{i}", prompt=i))[0] for i in range(3)]
        together = self.complete(engine, *(self.request(engine, row=f"r{i}", prompt=i, order=i) for i in range(3)))
        assert [list(c.token_ids) for c in alone] == [list(c.token_ids) for c in together]

    def test_can_be_started_again(self, engine):
        request = self.request(engine)
        assert self.complete(engine, request) == self.complete(engine, request)

    def test_is_pickled_by_its_description(self, engine):
        import pickle

        async def copy_while_live():
            await engine.start()
            try:
                return pickle.loads(pickle.dumps(engine))
            finally:
                await engine.close()

        copy = run(copy_while_live())
        assert copy.identity == engine.identity
        assert self.complete(copy, self.request(copy)) == self.complete(engine, self.request(engine))

    def test_the_miniature_student_is_what_runs(self, engine):
        assert engine.tokenizer.get_vocab() == self.student_tokenizer().get_vocab()

    def student_tokenizer(self):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(demo.STUDENT)


class ModelContract(EngineContract):
    """What engines that run a model must do besides: read their prompt, and draw by the seed."""

    def test_goes_on_after_foreign_ids(self, engine):
        """What was rolled back is forgotten, what the other author wrote is read."""

        async def session():
            await engine.start()
            try:
                first = self.request(engine, row="a", tokens=8)
                written = await engine.complete(first)
                vocabulary = Vocabulary(engine.tokenizer, "student")
                foreign = vocabulary.encode(" 7 + 1 = 8").ids
                ids = array("i", [*first.prompt_ids, *written.token_ids[:2], *foreign])
                warm = await engine.complete(self.request(engine, row="a", ids=ids))
                cold = await engine.complete(self.request(engine, row="b", ids=ids))
                engine.release("a")
                again = await engine.complete(self.request(engine, row="a", ids=ids))
                return list(warm.token_ids), list(cold.token_ids), list(again.token_ids)
            finally:
                await engine.close()

        warm, cold, again = run(session())
        assert warm == cold == again

    def test_a_seed_repeats_itself_and_another_does_not(self, engine):
        requests = [
            self.request(engine, row=f"r{i}", tokens=24, temperature=1.5, seed=seed)
            for i, seed in enumerate((1, 1, 2))
        ]
        first, same, other = self.complete(engine, *requests)
        assert list(first.token_ids) == list(same.token_ids) != list(other.token_ids)
