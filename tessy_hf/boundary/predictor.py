"""Boundary predictors tell style from capability: token ids go in, a boolean per token comes out, ``True`` for style.

The model is a stock ``AutoModelForTokenClassification``. Knows nothing of authors or rollback.

A token at position ``p`` of the thinking is always read from the window that starts at :func:`window_start` of ``p``,
so labels depend on the text alone and not on how it was cut into chunks.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from tessy_hf.boundary.torch_reader import TorchReader
from tessy_hf.engines.model_files import ModelFiles
from tessy_hf.errors import BoundaryError
from tessy_hf.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from tessy_hf.boundary.server_reader import ServerReader
    from tessy_hf.boundary.vllm_reader import VLLMReader

LabelShift = Literal[0, 1]
"""0: the label at token j is about token j. 1: it is about token j + 1."""

DEFAULT_WINDOW = 200
"""The most tokens of thinking to read, as in the authors' released scripts."""


class Convention(NamedTuple):
    """How a checkpoint's labels are read.

    Attributes:
        label_shift: See :data:`LabelShift`.
        style_label: The number of the label for style.
        lookahead: How many words beyond a word are read before it is judged: the label at the first letter of the last
            of them is about that word.
        end_id: The token that stands for each of these words where the text has ended.
    """

    label_shift: LabelShift
    style_label: int
    lookahead: int = 0
    end_id: int = 0


SHIPPED = "tessy_hf.boundary.small"
"""The name of the small predictor in this package (the folder ``small`` next to this file)."""

_SHIPPED_FOLDER = Path(__file__).with_name("small")

KNOWN_CHECKPOINTS = {
    "CoopReason/Boundary_Predictor_Teacher_Code": Convention(label_shift=1, style_label=1),
    "CoopReason/Boundary_Predictor_Student_Code": Convention(label_shift=1, style_label=1),
}
"""Published checkpoints whose config does not state their convention."""


def window_start(position: int, window: int) -> int:
    """Return the start of a token's window: a multiple of half the window, at most ``window`` tokens back."""
    stride = max(1, window // 2)
    return max(0, -(-(position + 1 - window) // stride)) * stride


def windows(positions: Iterable[int], window: int) -> Iterator[tuple[int, list[int]]]:
    """Group token positions, in order, by the start of the window that each is read from."""
    for start, group in groupby(positions, lambda position: window_start(position, window)):
        yield start, list(group)


class BoundaryPredictor:
    """A token classifier that tells style from capability.

    Only describes the checkpoint until :meth:`start` loads it, so it can be pickled and fingerprinted.

    Args:
        model: Hub id or folder; by default the small predictor in this package, for English reasoning text (see
            ``recipes/boundary/README.md`` for its quality).
        revision: Branch, tag or commit on the Hub.
        label_shift: See :data:`LabelShift`; required if the checkpoint's config does not state it.
        style_label: The number of the label for style; required if the config's label names do not state it.
        window: The most tokens to read; by default the config's ``window``, else 200.
        device: Torch device; by default CUDA, then MPS, then CPU.
        engine: ``transformers``; ``vllm``, which computes only the new tokens of a window; or ``server``, vLLM pooling
            servers (``vllm serve MODEL --runner pooling``).
        **options: For vLLM, passed to ``vllm.EngineArgs``, for instance ``gpu_memory_utilization=0.1``. For servers
            ``base_url``, one or a list, and ``api_key_env``, ``timeout``, ``retry_timeout`` as of ``ServerEngine``.

    Raises:
        BoundaryError: The engine is unknown, or does not take options.
    """

    def __init__(
        self,
        model: str = SHIPPED,
        *,
        revision: str | None = None,
        label_shift: LabelShift | None = None,
        style_label: int | None = None,
        window: int | None = None,
        device: str | None = None,
        engine: Literal["transformers", "vllm", "server"] = "transformers",
        **options: Any,
    ) -> None:
        allowed = {"transformers": not options, "vllm": True, "server": "base_url" in options}
        if not allowed.get(engine):
            raise BoundaryError(
                f"BoundaryPredictor got engine={engine!r} with the options {sorted(options)}. Expected is "
                'engine="transformers" without options, engine="vllm", or engine="server" with base_url. Fix them.'
            )
        self.model = str(model)
        self.revision = revision
        self.files = ModelFiles(self.model, revision)
        self._stated = {"label_shift": label_shift, "style_label": style_label, "window": window}
        self._device = device
        self._engine = engine
        self._options = options
        self._live: _Live | None = None

    @classmethod
    def from_pretrained(cls, model: str | Path = SHIPPED, **options: Any) -> BoundaryPredictor:
        """Create a predictor and load it.

        Args:
            model: Hub id or folder.
            **options: As for the class.

        Raises:
            BoundaryError: There is no such token classifier, or its label convention is not stated anywhere.
        """
        predictor = cls(str(model), **options)
        predictor.start()
        return predictor

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the predictions, for the run's fingerprint."""
        if self.model == SHIPPED:
            return {"model": SHIPPED, "revision": None, **self._stated, "weights": _shipped_digest()}
        return {**self.files.identity, **self._stated}

    def check(self) -> None:
        """Check before any weights are loaded that there is such a predictor, and how its labels are read.

        Raises:
            BoundaryError: There is none, or its label convention is not stated anywhere.
            EngineDeadError: It is to run in vLLM, which is not installed.
        """
        if self._engine == "vllm":
            from tessy_hf.engines.vllm_process import check_installed

            check_installed()
        if self.model != SHIPPED:
            _convention(self.model, _describe(self.files.path, self.revision)[0], self._stated)

    def start(self) -> None:
        """Load the model, or reach the servers that have it, if that is not done yet.

        Raises:
            BoundaryError: The model cannot be loaded, or is no predictor.
            EngineDeadError: A server cannot be reached or has another model, or vLLM does not run.
        """
        if self._live is None:
            self._live = _Live(self)
        if self._engine == "server":
            self._reach(self._live)

    async def ready(self) -> None:
        """Do as :meth:`start` does; servers are waited for beside the event loop."""
        if self._engine == "server":
            await asyncio.to_thread(self.start)
        else:
            self.start()

    def _reach(self, live: _Live) -> None:
        try:
            cast("ServerReader", live.reader).start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Unload the model."""
        if self._live is not None:
            self._live.reader.close()
            self._live = None

    @property
    def live(self) -> _Live:
        """The loaded model; loads it on first use."""
        self.start()
        assert self._live is not None
        return self._live

    def probabilities(self, windows: Sequence[Sequence[int]]) -> list[list[float]]:
        """Return, for each id of each window, the probability that its label says style.

        Raises:
            BoundaryError: The predictor runs in vLLM.
        """
        reader = self.live.reader
        if not isinstance(reader, TorchReader):
            raise BoundaryError(f"{self!r} runs in vLLM and has no probabilities here. Leave engine= out.")
        return reader.probabilities(windows)

    @property
    def label_shift(self) -> int:
        """How far ahead a label looks, in tokens."""
        return self.live.convention.label_shift

    @property
    def lookahead(self) -> int:
        """How many words beyond a word are read before it is judged."""
        return self.live.convention.lookahead

    @property
    def end_id(self) -> int:
        """The token that stands for each word of the look-ahead where the text has ended."""
        return self.live.convention.end_id

    @property
    def window(self) -> int:
        """The most tokens to read."""
        return self.live.window

    @property
    def vocabulary(self) -> Vocabulary:
        """The predictor's own vocabulary."""
        return self.live.vocabulary

    def same_as(self, other: object) -> bool:
        """Return whether another predictor, once loaded, is the same network run in the same way."""
        if not isinstance(other, BoundaryPredictor) or {type(self), type(other)} != {BoundaryPredictor}:
            return False  # a subclass may differ in what only it knows
        run = (self._engine, self._device, self._options) == (other._engine, other._device, other._options)
        return run and self.identity == other.identity

    async def labels(self, window: Sequence[int], since: int = 0) -> Sequence[bool]:
        """Return, for each token of ``window`` from index ``since`` on, whether its label says style.

        Concurrent calls are batched.

        Raises:
            BoundaryError: The model failed.
        """
        return await self.live.reader.submit(window, since)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle the description only."""
        return {**self.__dict__, "_live": None}

    def __repr__(self) -> str:
        return f"BoundaryPredictor({self.model!r})"


class _Live:
    """A loaded predictor: label convention, window, vocabulary and reader."""

    def __init__(self, predictor: BoundaryPredictor) -> None:
        model, revision, stated = predictor.files.path, None, predictor._stated
        if model == SHIPPED:
            _shipped_digest()  # raises if it is missing
            model = str(_SHIPPED_FOLDER)
        else:
            revision = predictor.files.pinned
        config, tokenizer = _describe(model, revision)
        network = _load(model, revision) if predictor._engine == "transformers" else None
        self.convention = _convention(model, config, stated)
        configured = getattr(config, "window", None) or DEFAULT_WINDOW
        self.window: int = configured if stated["window"] is None else stated["window"]
        if self.window < 2:
            raise BoundaryError(
                f"The window of {model!r} is {self.window}. Pass window=200 or another number above 1."
            )
        self.vocabulary = Vocabulary(tokenizer, model)
        style = self.convention.style_label
        self.reader: TorchReader | VLLMReader | ServerReader
        if network is not None:
            self.reader = TorchReader(network, style, predictor._device, self.window)
        elif predictor._engine == "server":
            from tessy_hf.boundary.server_reader import ServerReader

            self.reader = ServerReader(predictor.model, style, self.window, predictor._options)
        else:
            from tessy_hf.boundary.vllm_reader import VLLMReader

            self.reader = VLLMReader(model, revision, style, self.window, predictor._options)


def is_shipped() -> bool:
    """Return whether this installation has the small predictor."""
    return (_SHIPPED_FOLDER / "model.safetensors").is_file()


def _shipped_digest() -> str:
    """Return a hash of the small predictor's weights, which identifies them in any installation.

    Raises:
        BoundaryError: This installation lacks it.
    """
    if not is_shipped():
        raise BoundaryError(
            f"No boundary predictor was given, and the small one of tessy-hf is missing from {_SHIPPED_FOLDER}. "
            "Reinstall the package, or pass a Hub id or folder."
        )
    return _digest(_SHIPPED_FOLDER / "model.safetensors")


@cache
def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


_EXPECTED = "Expected is a Hub id or folder with a token-classification model in safetensors and its tokenizer."


def _describe(model: str, revision: str | None) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    from transformers import AutoConfig, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        return AutoConfig.from_pretrained(model, revision=revision), tokenizer
    except (OSError, ValueError) as error:
        raise BoundaryError(f"No boundary predictor could be loaded from {model!r}: {error} {_EXPECTED}") from error


def _load(model: str, revision: str | None) -> PreTrainedModel:
    from transformers import AutoModelForTokenClassification

    try:
        network, info = AutoModelForTokenClassification.from_pretrained(
            model, revision=revision, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise BoundaryError(f"No boundary predictor could be loaded from {model!r}: {error} {_EXPECTED}") from error
    if info["missing_keys"]:
        raise BoundaryError(
            f"{model!r} has no trained weights for {sorted(info['missing_keys'])[:3]}: it is not a token classifier. "
            "Pass a boundary predictor, for instance one of "
            f"{', '.join(KNOWN_CHECKPOINTS)}, or train one."
        )
    return network


def _convention(model: str, config: Any, stated: dict[str, Any]) -> Convention:
    """Return how labels are read, as stated by the user, else by the config, else by :data:`KNOWN_CHECKPOINTS`."""
    known = KNOWN_CHECKPOINTS.get(model)
    named = [i for i, name in (config.id2label or {}).items() if str(name).lower() == "style"]
    candidates: dict[str, tuple[Any, ...]] = {
        "label_shift": (stated["label_shift"], getattr(config, "label_shift", None), known and known.label_shift),
        "style_label": (stated["style_label"], named[0] if named else None, known and known.style_label),
    }
    found: dict[str, Any] = {
        key: next((v for v in values if v is not None), None) for key, values in candidates.items()
    }
    if found["style_label"] is None and config.num_labels == 2:
        found["style_label"] = 1 if found["label_shift"] is not None else None
    if found["label_shift"] not in (0, 1):
        raise BoundaryError(
            f"The config of the boundary predictor {model!r} does not state whether a label is about its own token or "
            f"the next one (label_shift is {found['label_shift']!r}; labels {dict(config.id2label)}). "
            "Pass BoundaryPredictor(..., label_shift=0) for its own token (the paper's text) or label_shift=1 for the "
            "next token (the authors' released checkpoints), or add it to config.json."
        )
    if found["style_label"] not in range(config.num_labels):
        raise BoundaryError(
            f"The boundary predictor {model!r} has the labels {dict(config.id2label)}; none is named 'style'. "
            "Pass BoundaryPredictor(..., style_label=1) with the number of the label for style, or name it in "
            "config.json."
        )
    lookahead, end_id = getattr(config, "lookahead", 0), config.eos_token_id
    if not isinstance(lookahead, int) or lookahead < 0 or (lookahead and (found["label_shift"] or end_id is None)):
        raise BoundaryError(
            f"The config of the boundary predictor {model!r} has lookahead={lookahead!r}, "
            f"label_shift={found['label_shift']} and eos_token_id={end_id!r}. Expected is a number of words, and "
            "where it is not 0, label_shift=0 and the id of an end token. Fix config.json."
        )
    return Convention(found["label_shift"], int(found["style_label"]), lookahead, end_id if lookahead else 0)
