"""Negative log-likelihoods under a causal language model: token ids go in, nats for each of them come out.

Knows nothing of prompts, rows or datasets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tessy_hf.engines.forward import forward
from tessy_hf.engines.model_files import located
from tessy_hf.errors import SettingsError
from tessy_hf.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STRETCH = 512
"""Tokens read in one forward pass, so that the memory for logits does not grow with the text."""


class Scorer:
    """Computes how unlikely a model finds each token of a text.

    Args:
        network: The model, in evaluation mode.
        stretch: Tokens read in one forward pass.
    """

    def __init__(self, network: PreTrainedModel, stretch: int = STRETCH) -> None:
        self._network, self._stretch = network, stretch

    def __call__(self, ids: Sequence[int], begin: int) -> list[float]:
        """Return the negative log-likelihood, in nats, of each id from index ``begin`` on.

        The first id of a text has nothing before it, so its likelihood is not measured.
        """
        import torch

        given = torch.tensor([ids], device=self._network.device)
        losses: list[float] = []
        cache = None
        with torch.inference_mode():
            for start in range(0, len(ids) - 1, self._stretch):
                stop = min(start + self._stretch, len(ids) - 1)
                logits, cache = forward(self._network, given[:, start:stop], cache)
                scores = logits[0].float().log_softmax(-1)
                losses += (-scores.gather(1, given[0, start + 1 : stop + 1, None])[:, 0]).tolist()
        return losses[max(begin - 1, 0) :]


def load_student(tokenizer: str, model: str | None = None) -> tuple[Vocabulary, Scorer | None]:
    """Load a student's tokenizer and, if ``model`` is given, its weights to score texts with.

    Args:
        tokenizer: A folder or Hub id with a tokenizer.
        model: A folder or Hub id with weights in safetensors.

    Raises:
        SettingsError: One of them cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        vocabulary = Vocabulary(AutoTokenizer.from_pretrained(located(tokenizer)), tokenizer)
        network = AutoModelForCausalLM.from_pretrained(located(model), use_safetensors=True) if model else None
    except (OSError, ValueError) as error:
        seen = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise SettingsError(
            f"{model or tokenizer!r} cannot be loaded: {seen}. Expected is a folder or a Hub id with a tokenizer, and "
            "for --student with weights in safetensors too. Check the name and HF_TOKEN."
        ) from error
    return vocabulary, Scorer(network.eval()) if network is not None else None
