"""A user's own function as the rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from tessy_hf.engines.base import Measure
from tessy_hf.errors import RequestError
from tessy_hf.method.rules.base import Rule, Word
from tessy_hf.trajectory import Author


class Function(Rule):
    """Hand over before each word of which a function returns true.

    Attributes:
        function: Takes a :class:`Word`. What both engines must measure for it is in its attribute ``needs``, for
            instance ``rule.needs = {"logprobs"}``.
    """

    name: ClassVar[str] = "function"
    function: Callable[[Word], Any]

    def needs(self, author: Author) -> frozenset[Measure]:
        """Return what an author's engine must measure."""
        return frozenset(getattr(self.function, "needs", ()))

    def hands_over(self, word: Word) -> bool:
        """Ask the function.

        Raises:
            RequestError: It raised something.
        """
        try:
            return bool(self.function(word))
        except Exception as error:  # noqa: BLE001 - it may be anybody's code
            raise RequestError(
                f"The rule of who writes next raised {type(error).__name__}: {error} for the word {word.text!r}. Fix "
                "the function passed as switch."
            ) from error
