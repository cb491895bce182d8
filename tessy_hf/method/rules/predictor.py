"""The paper's rule: boundary predictors say where an author's kind of text ends."""

from __future__ import annotations

from typing import ClassVar

from tessy_hf.method.judging import Judge, PredictorJudge
from tessy_hf.method.row import Row
from tessy_hf.method.rules.base import Rule
from tessy_hf.plan import Plan
from tessy_hf.trajectory import Author


class Predictor(Rule):
    """Hand over where the author's boundary predictor finds text of the other kind."""

    name: ClassVar[str] = "predictor"
    reads_predictors: ClassVar[bool] = True

    def check(self, plan: Plan) -> None:
        """Refuse nothing: methods that do not alternate have no use for it."""

    def judge(self, author: Author, row: Row) -> Judge | None:
        """Return the author's predictor at work."""
        predictor = row.speakers[author].boundary
        if predictor is None:
            return None
        reader = row.transcript.reader(predictor.vocabulary)
        return PredictorJudge(predictor, reader, own_kind=author == "student")  # style is the student's
