"""The engine protocol: token ids in, token ids out. Knows nothing of thinking, authors or boundaries.

An engine is described by light data (a model id and options) until :meth:`Engine.start`, so that it can be pickled,
fingerprinted and sent to other processes; live handles never leave the process.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from tessy_hf.errors import EngineDeadError
from tessy_hf.trajectory import Part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Measure = Literal["logprobs", "entropies", "score"]
"""What an engine can measure: see :class:`Request` and :meth:`Engine.score`."""


@dataclass(frozen=True, slots=True)
class Request:
    """One piece of text asked of an engine.

    Attributes:
        row: The row's key. Engines keep a row's cache by it.
        order: The row's place in the run; lower is older and should be served first.
        part: Whether the thinking or the answer is being written.
        prompt_ids: All ids so far. Grows while a row is written; not to be changed, nor kept but as a copy.
        max_tokens: The most new tokens wanted.
        temperature: 0 for greedy decoding.
        top_p: Nucleus sampling mass.
        seed: The row's seed. The token at position ``p`` of the row is to be drawn from ``(seed, p)``, so that a
            rerun of a row repeats it.
        stop_ids: Ids that end the text.
        top_k: As in :class:`tessy_hf.plan.Sampling`, like those below.
        min_p: Least share of the most probable token's probability.
        repetition_penalty: Against tokens that the text has already.
        logprobs: Whether log-probabilities of the new tokens are wanted.
        entropies: Whether entropies of their distributions are wanted.
    """

    row: str
    order: int
    part: Part
    prompt_ids: Sequence[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop_ids: frozenset[int]
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    logprobs: bool = False
    entropies: bool = False

    @property
    def set_sampling(self) -> dict[str, float]:
        """The sampling parameters that restrict something, by the names that vLLM and most servers have for them."""
        named = {"top_k": self.top_k, "min_p": self.min_p, "repetition_penalty": self.repetition_penalty}
        return {name: value for name, value in named.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine wrote.

    Attributes:
        token_ids: The new ids, without the one that stopped it.
        stop_id: The id from ``stop_ids`` that ended the text, or ``None`` where ``max_tokens`` did.
        uncached_prompt_tokens: How many ids of the prompt were not in the engine's cache, where it says so.
        logprobs: The log-probability of each new id, where asked for: of the model's own distribution, before
            temperature, top-p and penalties.
        entropies: The entropy in nats of that distribution over the whole vocabulary, where asked for.
    """

    token_ids: Sequence[int]
    stop_id: int | None
    uncached_prompt_tokens: int | None = None
    logprobs: Sequence[float] | None = None
    entropies: Sequence[float] | None = None


class Scores(NamedTuple):
    """How likely a model finds given ids, one value for each.

    Attributes:
        logprobs: Log-probabilities, each after all ids before it.
        ranks: How many ids of the vocabulary are at least as likely: 1 for the most likely one.
    """

    logprobs: list[float]
    ranks: list[int]


class Engine(Protocol):
    """What a speaker needs of a model server."""

    @property
    def model(self) -> str:
        """The model's name, for people and manifests."""
        ...

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the text this engine writes (model, revision, precision), for the run's fingerprint."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Loading it must not load the model."""
        ...

    @property
    def context_length(self) -> int:
        """The most tokens a prompt and its completion may have together. Valid after :meth:`start`."""
        ...

    @property
    def cache_tokens(self) -> int | None:
        """How many tokens of rows its cache holds; ``None`` where it does not tell. Valid after :meth:`start`."""
        ...

    async def start(self) -> None:
        """Make the engine ready. May be called again; called from the loop that will call :meth:`complete`."""
        ...

    async def complete(self, request: Request) -> Completion:
        """Continue ``request.prompt_ids``.

        Raises:
            RequestError: This request failed for good.
            EngineDeadError: No request can succeed any more.
        """
        ...

    @property
    def streams(self) -> bool:
        """Whether :meth:`stream` can be used. Valid after :meth:`start`."""
        ...

    def stream(self, request: Request) -> AsyncGenerator[Completion, None]:
        """Continue ``request.prompt_ids`` piece by piece; ``aclose()`` breaks off.

        Yields:
            What was written since the last piece. The last one has the ``stop_id``, or ends at ``max_tokens``.

        Raises:
            RequestError: This request failed for good.
            EngineDeadError: No request can succeed any more.
        """
        ...

    @property
    def measures(self) -> frozenset[Measure]:
        """What it can measure besides writing. Valid after :meth:`start`."""
        ...

    async def score(self, prompt_ids: Sequence[int], ids: Sequence[int], *, row: str = "", order: int = 0) -> Scores:
        """Score ``ids`` as the continuation of ``prompt_ids``, of which there is at least one.

        Only ids that the engine's cache does not hold are read, where it can use its cache for this. ``row`` and
        ``order`` are as in :class:`Request`; one row scores one text at a time.

        Raises:
            RequestError: This request failed for good, or the engine cannot score.
            EngineDeadError: No request can succeed any more.
        """
        ...

    def release(self, row: str) -> None:
        """Forget what is kept for a row that has ended."""
        ...

    async def close(self) -> None:
        """Let go of all resources. The engine may be started again."""
        ...


def load_tokenizer(model: str, revision: str | None, hint: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer, and never code that comes with it; ``options`` are those of ``from_pretrained``.

    Raises:
        EngineDeadError: There is none. The message ends in ``hint``.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model, revision=revision, **options)
    except (ImportError, OSError, ValueError) as error:
        is_path = (model.startswith((".", "/", "~")) or model.count("/") > 1) and not Path(model).exists()
        why = "there is no such folder." if is_path else error
        raise EngineDeadError(f"The tokenizer of {model!r} could not be loaded: {why} {hint}") from error
    return tokenizer


def derive_seed(*parts: object) -> int:
    """Derive a 63-bit seed from the parts, the same on every machine."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1
