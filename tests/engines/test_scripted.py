import asyncio

import pytest

from tessy_hf import Script, ScriptedEngine
from tessy_hf.errors import RequestError
from tests.engines.contract import EngineContract, run

TEXT = "okay so 1 + 1 = 2 and that is how it goes when one counts with care from one to the next number"


def same_text(row):
    return Script(TEXT)


class TestScriptedEngine(EngineContract):
    @pytest.fixture
    def engine(self):
        return ScriptedEngine(same_text)

    def texts(self, script, *turns):
        """Play turns: each is how many characters of the last chunk are kept, and what another author adds."""
        engine = ScriptedEngine({"r": script})

        async def session():
            await engine.start()
            ids = list(self.request(engine).prompt_ids)
            vocabulary = engine._vocabulary
            written = []
            for kept, added in [*turns, (0, "")]:
                completion = await engine.complete(self.request(engine, ids=ids, tokens=6))
                text = vocabulary.decode(completion.token_ids)
                written.append(text)
                ids += vocabulary.encode(text[: text.find(kept) + len(kept)] if kept else "").ids
                ids += vocabulary.encode(added).ids
            return written

        return run(session())

    def test_goes_on_after_what_was_kept(self):
        first, second = self.texts("okay so 1 + 1 = 2 wait", ("okay so", " 5 + 5 = 0"))
        assert first.startswith("okay so 1 + 1")
        assert second.startswith(" 1 + 1 = 2")

    def test_a_list_gives_each_turn_its_text_and_writes_on_into_the_next(self):
        first, second = self.texts(["okay so", " hmm now", " wait"], ("okay so", " 5 + 5 = 0"))
        assert first == "okay so hmm now wait"
        assert second == " hmm now wait"

    def test_goes_on_from_inside_a_token(self):
        first, second = self.texts("okay so 1 + 1 = 2", ("okay s", ""))
        assert first.startswith("okay so")
        assert second.startswith(" so 1")  # the script goes on at the last whole word that was kept

    def test_faults_latencies_and_unknown_rows(self):
        slow = ScriptedEngine({"a": "x"}, latency=lambda request: 0.01, fault=lambda request: OSError("cut"))

        async def session():
            await slow.start()
            with pytest.raises(OSError, match="cut"):
                await slow.complete(self.request(slow, row="a"))
            fine = ScriptedEngine({"a": "x"})
            await fine.start()
            with pytest.raises(RequestError, match="no script for row 'b'"):
                await fine.complete(self.request(fine, row="b"))
            return await asyncio.wait_for(fine.complete(self.request(fine, row="a")), 5)

        completion = run(session())
        assert completion.stop_id is not None
        assert slow.requests == 1
