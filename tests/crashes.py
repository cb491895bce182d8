"""Runs in processes of their own, to be killed at any moment, and an account of every call of an engine in them.

The processes are forks of one server that has imported everything, so that a run begins at once. What engines were
asked and what they answered is in one log that all processes append to; a line is written whole or not at all.
"""

import json
import multiprocessing
import os
import random
import re
import signal
import sqlite3
import threading
import time
from collections import defaultdict
from contextlib import aclosing, closing
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import datasets
import torch
from datasets import Dataset

from tessy_hf import Script, ScriptedEngine, ServerEngine, Speaker, TessyTransform, TransformersEngine, demo
from tessy_hf.engines.scripted import _Play
from tessy_hf.run import commits
from tessy_hf.run.journal import Journal
from tests import real_pair
from tests.rules import RulePredictor, by_first_letter, vocabulary
from tests.worlds import make_tokenizer

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.crashes", "tests.warm"])
KIND = "qwen"
make_tokenizer(KIND)


# --- engines that keep account


class Call(NamedTuple):
    """A line of the log: a request that began, or an answer (of a stream, a piece of it) that came."""

    what: str
    process: int
    author: str
    row: str
    part: str
    prompt: int
    tokens: int
    at: float


class Account:
    """Mixed into an engine: writes its calls down."""

    log = author = None

    def _note(self, what, request, tokens=0):
        at = len(request.prompt_ids), tokens, time.monotonic()
        line = json.dumps([what, os.getpid(), self.author, request.row, request.part, *at]) + "\n"
        file = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    async def complete(self, request):
        self._note("asked", request)
        completion = await super().complete(request)
        self._note("answered", request, len(completion.token_ids))
        return completion


class CountedModel(Account, TransformersEngine):
    """A miniature model."""

    async def stream(self, request):
        self._note("asked", request)
        async with aclosing(super().stream(request)) as pieces:
            async for piece in pieces:
                self._note("answered", request, len(piece.token_ids))
                yield piece


class CountedServer(Account, ServerEngine):
    """A model behind a server."""


class CountedScript(Account, ScriptedEngine):
    """Plays a script of words that occur once each, and so knows from a prompt alone where to go on, as models do."""

    async def complete(self, request):
        if request.row not in self._plays and request.part == "thinking":
            self._plays[request.row] = play = _Play(self._find(request.row), self._vocabulary, request.prompt_ids[-1])
            prompt = self._vocabulary.decode(request.prompt_ids)
            own = [word for word in re.findall(r"[a-z]+\d\d", prompt) if word in play.text]
            play.cursor = play.text.index(own[-1]) + len(own[-1]) if own else 0
        return await super().complete(request)


class CheapPredictor(RulePredictor):
    """The rule by first letters, without decoding all text before each token."""

    async def labels(self, window_ids, since=0):
        pieces, word, labels = [self._piece(i) for i in window_ids], "", []
        for piece in pieces:
            word = piece if not piece.strip() or piece[0].isspace() else word + piece
            labels.append("a" <= word.lstrip()[:1] <= "m")
        return labels[since:]

    def _piece(self, token):
        return _decoded(token)


@cache
def _decoded(token):
    return vocabulary(KIND).decode([token])


# --- rows


def student_says(row):
    """Mostly style, which begins with j, and now and then a word of the other kind, which ends the turn."""
    draw = random.Random(f"student {row}")
    words = [f"{'p' if draw.random() < 0.3 else 'j'}a{n:02}" for n in range(draw.randrange(2, 6))]
    return Script(" ".join(words), f"the answer is {row} .")


def teacher_says(row):
    """Mostly capability, which begins with p."""
    draw = random.Random(f"teacher {row}")
    return Script(" ".join(f"{'j' if draw.random() < 0.3 else 'p'}b{n:02}" for n in range(60)), "never asked")


def script_rows(numbers):
    return Dataset.from_dict({"id": [f"r{i}" for i in numbers], "prompt": [f"What is {i}?" for i in numbers]})


def model_rows(numbers):
    return demo.prompts(max(numbers) + 1, seed=4).select(numbers)


def scripts(folder, latency=0.06, **settings):
    """A transform over scripts."""
    engines = []
    for author, says in (("teacher", teacher_says), ("student", student_says)):
        engine = CountedScript(says, tokenizer=make_tokenizer(KIND), latency=latency, name=author)
        engine.log, engine.author = str(folder / "calls"), author
        engines.append(engine)
    teacher, student = (Speaker(engine, boundary=CheapPredictor(by_first_letter, KIND)) for engine in engines)
    return TessyTransform(
        teacher=teacher,
        student=student,
        **{
            "id_column": "id",
            "temperature": 0.0,
            "journal": str(folder / "journal"),
            "rows_in_flight": 64,
            **settings,
        },
    )


def models(folder, **settings):
    """A transform over the miniature models."""
    boundaries = {"teacher": demo.BOUNDARY_TEACHER, "student": demo.BOUNDARY_STUDENT}
    speakers = {}
    for author, model in (("teacher", demo.TEACHER), ("student", demo.STUDENT)):
        engine = CountedModel(str(model))
        engine.log, engine.author = str(folder / "calls"), author
        speakers[author] = Speaker(engine, boundary=str(boundaries[author]))
    budgets = {"max_thinking_tokens": 160, "max_answer_tokens": 32}
    given = {"id_column": "id", "temperature": 0.0, "journal": str(folder / "journal"), "rows_in_flight": 16}
    return TessyTransform(**speakers, **{**budgets, **given, **settings})


def served(folder, url, protocol, **settings):
    """A transform over the miniature models, of which a server has the student."""
    transform = models(folder, **settings)
    engine = CountedServer("student", base_url=url, tokenizer=str(demo.STUDENT), retry_timeout=300.0)
    engine.protocols, engine.log, engine.author = (protocol,), str(folder / "calls"), "student"
    transform.student.engine = engine
    return TessyTransform(teacher=transform.teacher, student=transform.student, **dict(transform.settings))


def real(folder, **settings):
    """A transform over the real models, see :mod:`tests.real_pair`."""
    transform = real_pair.transform(**{"journal": str(folder / "journal"), **settings})
    speakers = {"teacher": transform.teacher, "student": transform.student}
    for author, speaker in speakers.items():
        speaker.engine = CountedModel(speaker.engine.model, dtype="float32")
        speaker.engine.log, speaker.engine.author = str(folder / "calls"), author
    return TessyTransform(**speakers, **dict(transform.settings))


WORLDS = {
    "scripts": (scripts, script_rows),
    "models": (models, model_rows),
    "served": (served, model_rows),
    "real": (real, lambda numbers: real_pair.prompts().select(numbers)),
}


class Work(NamedTuple):
    """What a process does: a world, a folder for journal and log, row numbers, settings, options of ``map``."""

    world: str
    folder: Path
    numbers: tuple[int, ...]
    settings: dict = {}
    options: dict = {}

    @property
    def transform(self):
        return WORLDS[self.world][0](self.folder, **self.settings)

    def run(self):
        """Write all rows; return what of them a greedy run repeats, and how they came out."""
        dataset = WORLDS[self.world][1](list(self.numbers))
        with self.transform as transform:
            rows = dataset.map(transform, batched=True, load_from_cache_file=False, **self.options)
        return [[row["id"], row["messages"], row["spans"], row["finish_reason"]] for row in rows]

    @property
    def journal(self):
        return Journal(self.folder / "journal", self.transform.run_fingerprint)


def _child(work, out):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started to ignore it
    torch.set_num_threads(1)
    # A pause between commits may cost what a fast engine writes meanwhile, which follows the machine's load.
    commits.LONGEST_PAUSE = 0.0
    datasets.utils.tqdm.set_lock(threading.RLock())  # its own would be left behind by those that are killed
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = work.folder / "cache" / "datasets"
    with open(work.folder / "stderr", "ab") as file:  # warnings of the dying
        os.dup2(file.fileno(), 2)
    rows = work.run()
    out.write_text(json.dumps(rows))


def begin(work, name="rows.json"):
    """Begin a run in a process of its own; its rows will be in the file of this name."""
    work.folder.mkdir(exist_ok=True)
    process = FORKS.Process(target=_child, args=(work, work.folder / name))
    process.start()
    return process


def end(process, work, name="rows.json"):
    """Wait for a run to end well, and return its rows."""
    process.join(120)
    assert process.exitcode == 0, (work.folder / "stderr").read_text()[-3000:]
    return json.loads((work.folder / name).read_text())


def unbroken(work, folder):
    """Return the rows of an undisturbed run without a journal, and its calls."""
    alone = work._replace(folder=folder, settings={**work.settings, "journal": None})
    return end(begin(alone), alone), calls(alone)


# --- what was done


def calls(work, since=0):
    """Return the calls in a log from a byte on."""
    path = work.folder / "calls"
    content = path.read_bytes()[since:] if path.exists() else b""
    return [Call(*json.loads(line)) for line in content.splitlines()]


def size(work):
    path = work.folder / "calls"
    return path.stat().st_size if path.exists() else 0


def kept(work):
    """Return what the journal has: the finished rows, and of each other row its text and the tokens it cost."""
    if not (work.folder / "journal").exists():
        return set(), {}
    journal = work.journal
    done = {key for key, _ in journal.finished()}
    with closing(sqlite3.connect(work.folder / "journal")) as db:
        rows = db.execute("SELECT id, key, state FROM rows WHERE finish_reason IS NULL").fetchall()
        pieces = defaultdict(str)
        for row, text in db.execute("SELECT row, text FROM pieces ORDER BY row, number"):
            pieces[row] += text
    states = {key: json.loads(state)["generated"] if state else {} for _, key, state in rows}
    journal.close()
    return done, {key: (pieces[row], sum(states[key].values())) for row, key, _ in rows}


def lost(made, done, before, after):
    """Return, for each row that was not finished, how many tokens came that are not in the journal."""
    answers = defaultdict(list)
    for call in made:
        if call.what == "answered" and call.row not in done:
            answers[call.row].append(call.tokens)
    lost = {}
    for row, tokens in answers.items():
        counted = after.get(row, ("", 0))[1] - before.get(row, ("", 0))[1]
        assert counted in accumulate(tokens, initial=0), f"{row}: {counted} tokens in the journal, {tokens} came"
        lost[row] = sum(tokens) - counted
    return lost


def kill_when(process, work, grown, pause, number=signal.SIGKILL):
    """Kill a run a moment after its log grew by so many bytes. Returns its exit code."""
    target, begun = size(work) + grown, time.monotonic()
    while process.is_alive() and size(work) < target:
        assert time.monotonic() < begun + 120, "the run stands still"
        time.sleep(0.002)
    time.sleep(pause)
    os.kill(process.pid, number)
    process.join(60)
    return process.exitcode
