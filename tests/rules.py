"""Stand-ins for models: boundary predictors that follow a rule, and engines whose every token a test decides."""

import asyncio
import zlib
from array import array
from dataclasses import replace
from functools import cache

from tessy_hf.engines.base import Completion
from tessy_hf.engines.scripted import ScriptedEngine
from tessy_hf.method.alternation import synthesize
from tessy_hf.method.speaker import Speaker
from tessy_hf.plan import Plan, Sampling
from tessy_hf.text.vocabulary import Vocabulary, words
from tessy_hf.trajectory import Prompt
from tests.worlds import make_tokenizer

PROMPT = Prompt("row-1", [{"role": "user", "content": "How many?"}], seed=7, order=3)


@cache
def vocabulary(kind):
    """The vocabulary of one kind of test tokenizer."""
    return Vocabulary(make_tokenizer(kind), kind)


# --- rules: what the label of the last of some ids is


def is_style_word(word):
    """Whether a word counts as style: it begins with one of the letters a to m."""
    return "a" <= word.lstrip()[:1] <= "m"


def by_first_letter(vocabulary, ids):
    """A token is of the kind of the word it belongs to (for ``label_shift=0``)."""
    text = vocabulary.decode(ids)
    spans = words(text)
    return bool(spans) and is_style_word(text[slice(*spans[-1])])


def after_comma(vocabulary, ids):
    """Style comes after a comma, capability after all else (for ``label_shift=1``)."""
    return vocabulary.decode(ids).rstrip().endswith(",")


def by_first_letter_of(lookahead):
    """A token is of the kind of the word so many words before its own, end tokens counted as words."""

    def rule(vocabulary, ids):
        end = min(vocabulary.special_ids)
        ended = next(n for n, i in enumerate([*reversed(ids), None]) if i != end)
        text = vocabulary.decode(ids[: len(ids) - ended])
        before = [text[start:stop] for start, stop in words(text)]
        at = len(before) - 1 + ended - lookahead
        return at in range(len(before)) and is_style_word(before[at])

    return rule


def by_all_ids(vocabulary, ids):
    """The most sensitive causal rule there is: any other id anywhere in the window may change the label."""
    return zlib.crc32(array("i", ids).tobytes()) % 4 == 0


def always_style(vocabulary, ids):
    """Everything is the student's kind."""
    return True


def never_style(vocabulary, ids):
    """Everything is the teacher's kind."""
    return False


class RulePredictor:
    """What :class:`tessy_hf.BoundaryPredictor` is to the method, with a rule in place of a network.

    A token's label depends on the ids of its window up to that token, and on nothing else.
    """

    def __init__(self, rule, kind="qwen", *, label_shift=0, lookahead=0, window=200):
        self.rule, self.label_shift, self.lookahead, self.window = rule, label_shift, lookahead, window
        self.vocabulary = vocabulary(kind)
        self.end_id = min(self.vocabulary.special_ids)
        self.identity = {"rule": rule.__name__, "kind": kind, "label_shift": label_shift, "window": window}
        self.longest = 0

    async def ready(self):
        """Nothing to load."""

    def close(self):
        """Nothing to let go of."""

    async def labels(self, window_ids, since=0):
        self.longest = max(self.longest, len(window_ids))
        return [self.rule(self.vocabulary, window_ids[: i + 1]) for i in range(since, len(window_ids))]


# --- who writes next by a user's own function


def own_rule(word):
    """All that a rule may look at: the author, the word, its place, what is before it, and how likely it is."""
    if word.author == "teacher":
        return word.place >= 3 or word.before.endswith("=")
    return word.logprob < -0.4 or word.text.strip() == "="


own_rule.needs = {"logprobs"}


def rule_name(rule):
    """A rule's name as an id of a test: a function's is the same in all processes."""
    return getattr(rule, "__name__", str(rule))


# --- engines


class CannedEngine:
    """Answers each request with the next of some completions, or raises it where it is an error."""

    def __init__(self, *answers, kind="qwen", context_length=1 << 30):
        self.answers = list(answers)
        self.streams = True
        self.requests = []
        self.released = []
        self.model, self.context_length, self.tokenizer = f"canned-{kind}", context_length, make_tokenizer(kind)
        self.identity = {"model": self.model}

    async def start(self):
        """Nothing to load."""

    async def close(self):
        """Nothing to let go of."""

    def release(self, row):
        self.released.append(row)

    async def complete(self, request):
        self.requests.append((request, list(request.prompt_ids)))
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def stream(self, request):
        """Give pieces of three tokens, and of what is left."""
        ids, left = array("i", request.prompt_ids), request.max_tokens
        while left:
            piece = await self.complete(replace(request, prompt_ids=array("i", ids), max_tokens=min(3, left)))
            yield piece
            if piece.stop_id is not None:
                return
            ids.extend(piece.token_ids)
            left -= len(piece.token_ids)


class TapeModel(CannedEngine):
    """Writes the same ids whatever the prompt, on from where its own ids in the prompt end, then stops.

    Only for an author that is never cut.
    """

    def __init__(self, ids, kind="qwen"):
        super().__init__(kind=kind)
        self.tape, self.begin = list(ids), None

    async def complete(self, request):
        if request.part == "answer":
            return Completion([], min(request.stop_ids))
        self.begin = len(request.prompt_ids) if self.begin is None else self.begin
        rest = self.tape[len(request.prompt_ids) - self.begin :]
        more = rest[: request.max_tokens]
        return Completion(more, min(request.stop_ids) if len(rest) <= request.max_tokens else None)


class GreedyModel(CannedEngine):
    """A language model decoded greedily: each next id is a function of all ids before it, and of nothing else.

    One token in 64 ends the text. After an id in ``follows`` comes the one it says, as the bytes of a character do.
    """

    def __init__(self, kind, weights, alphabet, follows=None):
        super().__init__(kind=kind)
        self.weights, self.alphabet, self.follows = weights, alphabet, follows or {}

    async def complete(self, request):
        state, new, last = (
            zlib.crc32(array("i", request.prompt_ids).tobytes(), self.weights),
            [],
            request.prompt_ids[-1],
        )
        while len(new) < request.max_tokens:
            if last not in self.follows and state % 64 == 0:
                return Completion(new, min(request.stop_ids))
            last = self.follows.get(last, self.alphabet[state % len(self.alphabet)])
            new.append(last)
            state = zlib.crc32(array("i", [last]).tobytes(), state)
        return Completion(new, None)


def ids_of(text, kind="qwen"):
    """The ids of a text."""
    return vocabulary(kind).encode(text).ids


def said(text, kind="qwen", stop=None):
    """A completion of this text: ended by a token, by name, or else by its budget."""
    stop_id = None if stop is None else vocabulary(kind).token_id(stop)
    assert stop is None or stop_id is not None, f"{kind} has no token {stop}"
    return Completion(ids_of(text, kind), stop_id)


def scripted(script, kind="qwen", **options):
    """A scripted engine for the one row of these tests."""
    return ScriptedEngine({PROMPT.key: script}, tokenizer=make_tokenizer(kind), name=f"scripted-{kind}", **options)


# --- writing a row


def write(teacher, student, boundaries=(None, None), *, prompt=PROMPT, begun=None, record=None, **plan):
    """Write one row with two engines and their predictors (the teacher's first), greedily.

    ``chunk_tokens`` may be a number, ``None`` to follow the spans, or "stream".
    """
    if plan.get("chunk_tokens") == "stream":
        plan = {**plan, "chunk_tokens": None, "stream": True}

    async def run():
        await teacher.start()
        await student.start()
        speakers = [Speaker(engine, boundary) for engine, boundary in zip((teacher, student), boundaries, strict=True)]
        drawn = {name: plan.pop(name) for name in Sampling._fields if name in plan}
        sampling = Sampling(**{"temperature": 0.0, **drawn})
        made = Plan(sampling=dict.fromkeys(("teacher", "student"), sampling), **plan)
        return await synthesize(prompt, *speakers, made, begun=begun, record=record)

    return asyncio.run(run())


def both(rule, kind="qwen", **options):
    """The same rule for teacher and student."""
    return RulePredictor(rule, kind, **options), RulePredictor(rule, kind, **options)


def spans(trajectory, part="thinking"):
    """The authors and texts of one part of a trajectory."""
    return [(span.author, span.text) for span in trajectory.spans if span.part == part]
