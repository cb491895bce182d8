"""2,000 prompts of all shapes that public datasets have, in runs that are killed at random: each row comes out once.

What a row must look like is known from how its prompt was made, not from the code that reads prompts.
"""

import random
import re
import signal
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from datasets import Dataset, Features, IterableDataset, Json, Value

from tessy_hf import ScriptedEngine, Speaker, TessyTransform
from tessy_hf.engines.base import Completion
from tests import crashes
from tests.rules import by_first_letter, vocabulary
from tests.worlds import make_tokenizer

ROWS = 2_000
KIND = crashes.KIND
TOOLS = "tool"
"""What the reason says where a template does not show calls of tools. Only models tell, so it is told after the id."""


# --- prompts, each with the messages it stands for or the beginning of the reason why it is none


def text(number, draw):
    """A question that names its number, among whatever else people write."""
    around = ["", "\n\n", " ", "Größe 🤯 ", "\u200b", "{{ x }} ", "<b> & ", "\\n\\u0041 ", "\r\n", "漢字 "]
    return f"{draw.choice(around)}Question {number}?{draw.choice(around)}"


def user(content):
    return {"role": "user", "content": content}


def parts(content, draw):
    cut = draw.randrange(1, len(content))
    first, rest = content[:cut], content[cut:]
    kinds = [
        [{"type": "text", "text": content}],
        [{"type": "text", "text": first}, {"type": "text", "text": rest}],
        [{"text": first}, rest],
        [{"type": "text", "text": first, "image": None}, {"type": "text", "text": None}, {"text": rest}],
    ]
    return draw.choice(kinds)


def good(number, draw):
    """A prompt that can be used, and its messages."""
    asked = text(number, draw)
    system, earlier = (
        {"role": "system", "content": "Be kind."},
        [user("Hi"), {"role": "assistant", "content": "Hello."}],
    )
    empty = {"role": "system", "content": draw.choice(["", None, " \n", []])}
    said = {"human": "user", "gpt": "assistant", "system": "system"}
    foreign = [{"from": "system", "value": "Be kind."}, {"from": "human", "value": asked}]
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello."}, {"from": "human", "value": asked}]
    plain = [user(asked)]
    return draw.choice(
        [
            (asked, plain),
            (plain, plain),
            ([system, user(asked)], [system, user(asked)]),
            ([*earlier, user(asked)], [*earlier, user(asked)]),
            ([system, *earlier, user(asked)], [system, *earlier, user(asked)]),
            ([empty, user(asked)], plain),
            ([empty, *earlier, user(asked)], [*earlier, user(asked)]),
            ([user(parts(asked, draw))], plain),
            ([user(parts("Hi", draw)), *earlier[1:], user(parts(asked, draw))], [*earlier, user(asked)]),
            (foreign, [{"role": said[m["from"]], "content": m["value"]} for m in foreign]),
            (talk, [{"role": said[m["from"]], "content": m["value"]} for m in talk]),
            ([{**user(asked), "name": None, "tool_calls": None, "weight": 1.0}], plain),
            ([user(asked), {"role": "assistant", "content": "Hello."}], plain),  # its answer is left out
        ]
    )


def bad(number, draw, stream):
    """A prompt that cannot be used, and some words of the reason."""
    asked = text(number, draw)
    call = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "add"}}]}
    kinds = [
        (None, "is not a prompt"),
        ("", "is empty"),
        (" \n\t", "is empty"),
        (number, "is not a prompt"),
        (number + 0.5, "is not a prompt"),
        (True, "is not a prompt"),
        ([], "is not a prompt"),
        ({"prompt": asked}, "is not a prompt"),
        ([asked], "message 0 is"),
        ([None], "message 0 is"),
        ([{"content": asked}], "message 0 has no role"),
        ([{"content": "Be kind."}, user(asked)], "message 0 has no role"),
        ([user(asked), {"role": None, "content": "Hi"}], "message 1 has no role"),
        ([user(None)], "is empty"),
        ([user("")], "is empty"),
        ([user([])], "is empty"),
        ([user(asked), {"role": "assistant", "content": None}, user(asked)], "message 1, by 'assistant', is empty"),
        ([user(asked), call, user(asked)], TOOLS),
        ([user({"text": asked})], "content of message 0 is"),
        ([user([{"type": "text", "text": asked}, {"type": "image", "url": "x"}])], "'image'"),
        ([{"role": "system", "content": asked}], "last message"),
        ([{"role": "system", "content": None}], "last message"),
    ]
    if stream:  # tables cannot hold these
        half = asked + "\ud83d"
        kinds += [(half, "surrogate"), ([user(half)], "surrogate"), ([user([{"text": half}])], "surrogate")]
        kinds += [([{"role": "\ude00", "content": "Hi"}, user(asked)], "surrogate")]
        kinds += [([user([{"text": [asked]}])], "part whose text is"), ([user([asked, number])], "part whose text is")]
        kinds += [(asked.encode(), "is not a prompt"), ([user(asked.encode())], "content of message 0 is")]
    return draw.choice(kinds)


class Row(NamedTuple):
    """A row of prompts, and what must come of it: messages, or some words of the reason why not."""

    number: int
    id: object
    prompt: object
    gold: str
    messages: list | None
    reason: str | None


@cache
def rows(stream, ids, corrected):
    """Draw the rows. Corrected ones have, in one of three, another question under the same id."""
    draw, made, used = random.Random(7), [], set()
    for number in range(ROWS):
        asked = number + 10_000 if corrected and number % 3 == 0 else number
        if draw.random() < 0.05:
            asked = draw.randrange(number + 1)  # as another row may do
        here, messages = random.Random(f"{stream} {asked}"), None
        if here.random() < 0.75:
            prompt, messages = good(asked, here)
            reason = None
        else:
            prompt, reason = bad(asked, here, stream)
        id, drawn = f"r{number}" if number % 5 else number, draw.random()  # some are numbers
        if reason != TOOLS and made and drawn < 0.05:
            id = draw.choice([row.id for row in made if row.reason != TOOLS] or [id])
        elif reason != TOOLS and drawn < 0.07:
            id = draw.choice([None, "", *([float("nan"), "\ud83d"] if stream else [])])
        if reason is None and ids:
            reason = fault_of(id, used)
        made.append(Row(number, id, prompt, answer(draw.choice([asked, -1])), None if reason else messages, reason))
    return made


def fault_of(id, used):
    """Return some words of the reason why an id cannot be used; else count it as used."""
    if id in (None, "") or id != id:
        return "has no id"
    if id == "\ud83d":
        return "surrogate"
    if str(id) in used:
        return "Ids must be unique"
    used.add(str(id))
    return None


def dataset(made, stream):
    given = [{"n": row.number, "id": row.id, "prompt": row.prompt, "gold": row.gold} for row in made]
    if stream:
        return IterableDataset.from_generator(lambda: iter(given))
    types = {"n": Value("int64"), "id": Json(), "prompt": Json(), "gold": Value("string")}
    return Dataset.from_list(given, features=Features(types))


# --- engines whose every word tells which question it answers


def thinking(author, number):
    draw = random.Random(f"{author} {number}")
    own, other, count = ("j", "p", draw.randrange(2, 5)) if author == "student" else ("p", "j", 12)
    return " ".join(f"{other if draw.random() < 0.3 else own}{author[0]}{n:02}q{number}" for n in range(count))


def answer(number):
    return f"It is {number} ."


class Answering(crashes.Account, ScriptedEngine):
    """Writes what its prompt asks for, on from its own last word there, as a model does: it knows no rows."""

    async def complete(self, request):
        self._note("asked", request)
        words, prompt = vocabulary(KIND), vocabulary(KIND).decode(request.prompt_ids)
        number = int(re.findall(r"Question (\d+)\?", prompt)[-1])
        if request.part == "answer":
            ids = words.encode(answer(number), request.prompt_ids[-1]).ids
        else:
            said = thinking(self.author, number)
            own = [word for word in re.findall(r"[a-z]+\d\dq\d+", prompt) if word in said]
            ids = words.encode(said[said.index(own[-1]) + len(own[-1]) :] if own else said, request.prompt_ids[-1]).ids
        stop = next(iter(request.stop_ids))
        done = Completion(ids[: request.max_tokens], stop if len(ids) <= request.max_tokens else None)
        self._note("answered", request, len(done.token_ids))
        return done


class Work(NamedTuple):
    """A run over the rows in a process of its own; see `tests.crashes`."""

    folder: Path
    stream: bool
    ids: bool
    corrected: bool

    @property
    def rows(self):
        return rows(self.stream, self.ids, self.corrected)

    @property
    def transform(self):
        speakers = {}
        for author in ("teacher", "student"):
            engine = Answering({}, tokenizer=make_tokenizer(KIND), name=author)
            engine.log, engine.author = str(self.folder / "calls"), author
            speakers[author] = Speaker(engine, boundary=crashes.CheapPredictor(by_first_letter, KIND))
        settings = {
            "id_column": "id" if self.ids else None,
            "temperature": 0.0,
            "chunk_tokens": 16,
            "rows_in_flight": 32,
        }
        verifier = {"name": "exact", "column": "gold"}
        return TessyTransform(**speakers, **settings, verifier=verifier, journal=self.folder / "journal")

    def run(self):
        given = dataset(self.rows, self.stream)
        with self.transform as transform:
            if self.stream:  # whose rows fit no schema
                return list(given.map(transform, batched=True, batch_size=150, remove_columns=["id", "prompt"]))
            return list(transform.map(given, batch_size=150, load_from_cache_file=False).remove_columns("prompt"))


def check(row, out):
    assert out["n"] == row.number
    if row.reason is not None:
        assert out["finish_reason"] == "error" and row.reason in out["error"], (row, out["error"])
        assert out["answer"] == out["thinking"] == "" and (out["messages"] == [] or row.reason == TOOLS)
        return
    assert out["finish_reason"] == "stop" and out["error"] is None, (row, out["error"])
    *prompt, last = out["messages"]
    assert prompt == row.messages
    number = re.search(r"Question (\d+)\?", row.messages[-1]["content"])[1]
    written = re.findall(r"q(\d+)", out["thinking"])
    assert written and set(written) == {number} and out["answer"] == answer(number)
    assert last["content"].endswith(answer(number)) and out["thinking"] in last["content"]
    assert out["verdict"] == (row.gold == answer(number))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stream", "ids"), [(False, True), (True, True), (False, False)], ids=["table", "stream", "without-ids"]
)
def test_each_row_comes_out_once_with_its_own_prompt_or_a_reason(tmp_path, stream, ids):
    """Runs over the rows and over corrected ones take turns in one journal until all are killed but the last ones."""
    draw = random.Random(stream)
    works = [Work(tmp_path / "runs", stream, ids, corrected) for corrected in (False, True)]
    for death in range(6):
        process = crashes.begin(works[death % 2])
        grown, pause = draw.randrange(50_000, 150_000), draw.uniform(0, 0.02)
        assert crashes.kill_when(process, works[0], grown, pause) == -signal.SIGKILL, f"it ended before death {death}"
    outs = []
    for work in works:
        outs.append(crashes.end(crashes.begin(work), work))
        for row, out in zip(work.rows, outs[-1], strict=True):
            check(row, out)
    start = crashes.size(works[0])
    assert crashes.end(crashes.begin(works[0]), works[0]) == outs[0]
    assert crashes.size(works[0]) == start, "a finished row was written again"
