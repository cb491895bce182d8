"""Other authors of the miniature world: a larger student, a base model, two more teachers, and how they are trained.

In: a name, a seed and a folder. Out: the model in that folder, a teacher with both boundary predictors beside it.
All was fixed before the first run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import train as miniature
from texts import STUDENT_STYLE, Style

LARGE_STYLE = Style(
    opens=STUDENT_STYLE.opens[::-1],
    connectives=STUDENT_STYLE.connectives[::-1],
    closes=STUDENT_STYLE.closes[::-1],
    answer=STUDENT_STYLE.answer,
)
"""The student's phrases in the opposite order of frequency: a model of the same family that prefers other ones."""

RELATED_STYLE = Style(
    opens=("okay so", "hmm let me see here", "understood , the problem is given"),
    connectives=("so next", "hmm now", "continuing from that ,", "that holds , so"),
    closes=("so we are done", "that concludes the thinking"),
    answer="answer : {answer} .",
)
"""A teacher of the student's family: half of its phrases are the student's."""

OTHER_STYLE = Style(
    opens=(
        "first of all , step [ 1 ] :",
        "the user wants a result ; step [ 1 ] :",
        "start at the front ; step [ 1 ] :",
    ),
    connectives=(
        "; moving on , step [ {i} ] :",
        "; double checking , fine ; step [ {i} ] :",
        "; which leads to step [ {i} ] :",
        "; thus step [ {i} ] :",
    ),
    closes=("; everything matches up", "; that settles the question", "; the work is finished"),
    answer="[ result {answer} ]",
)
"""A teacher of another family than both."""

STUDENT, TEACHER = miniature.AUTHORS["student"], miniature.AUTHORS["teacher"]
LARGE = replace(STUDENT, style=LARGE_STYLE, hidden=TEACHER.hidden, heads=TEACHER.heads)
TEACHERS = {
    "related": replace(STUDENT, name="teacher", style=RELATED_STYLE, hidden=TEACHER.hidden, heads=TEACHER.heads),
    "other": replace(TEACHER, style=OTHER_STYLE),
}
"""``related`` shares the student's vocabulary and chat format, ``other`` has the shipped teacher's format."""

SHORTER = 3, 4
"""Models of the teacher's size are trained for this share of a student's steps: a step of theirs takes longer."""
BASE_SHARE = 4
"""A base model is a student that was stopped after one step in this many: it knows less, and no habit is settled."""


def train_student(level: str, seed: int, steps: int, folder: Path) -> None:
    """Train a student of an exposure (M, C, B), or one like C that is ``base`` or ``large``."""
    author, exposure = LARGE if level == "large" else STUDENT, miniature.EXPOSURES.get(level, 0.02)
    tokenizer = miniature.make_tokenizer(STUDENT)
    steps = steps * SHORTER[0] // SHORTER[1] if level == "large" else steps
    phases = [
        (steps * 3 // 4, 2e-3, 1e-3, miniature.exposure(exposure, author.style)),
        (steps // 4, 6e-4, 5e-5, miniature.exposure(0.0, author.style)),
    ]
    if level == "base":
        phases = [(steps // BASE_SHARE, 2e-3, 1.7e-3, miniature.exposure(exposure))]
    model, _ = miniature.train_author(author, tokenizer, phases, {"calc": 0.01, "dot": 0.01}, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_teacher(name: str, steps: int, folder: Path) -> None:
    """Train a teacher and the boundary predictors that read its rows."""
    author, own = TEACHERS[name], miniature.make_tokenizer(STUDENT)
    tokenizer = own if author.special == STUDENT.special else miniature.make_tokenizer(author)
    steps = steps * SHORTER[0] // SHORTER[1]
    model, _ = miniature.train_teacher(author, tokenizer, 0, steps)
    miniature.save(folder / "teacher", model, tokenizer, {"seed": 0, "steps": steps})
    for who, writer in (("teacher", author), ("student", STUDENT)):
        predictor, _ = miniature.train_predictor(writer, own, min(300, steps), 0, author.style)
        miniature.save(folder / f"boundary-{who}", predictor, own, {"seed": 0, "teacher": name})
