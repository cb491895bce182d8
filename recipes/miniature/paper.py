"""The paper's figures in miniature: which models, sets and fine-tuned students each needs, and how one is made.

In: seeds. Out: one small JSON file for each unit of work, and PAPER.md with a small figure each.

    python recipes/miniature/paper.py --out output/paper

Goes on where it was stopped, as `reproduce.py` does, with whose units it works. Figures are completed one after
another, the cheapest first; ``--write`` writes PAPER.md from what is there. All settings were fixed before the first
run, but for the learning rate of on-policy distillation, see there.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import figures
import reproduce
import train as miniature
import transformers
import world
from reproduce import SYNTHESIS, Scale, Unit

from tessy_hf import demo

log = logging.getLogger("paper")

N = reproduce.MAIN
"""Rows in each set: 144 steps of fine-tuning."""
SYSTEM = "mode 2 ."
"""The system prompt that isolates new rows (figure 10); the student has never seen one."""
LIMITS = (24, 32, 40, 48, 64, 160)
"""Limits of thinking tokens (figure 6)."""
EPOCHS = (1, 2, 3, 5, 7, 9)
"""Epochs after which a student is examined, on a third of the prompts (figure 11)."""
SCORED = 100
"""Rows of each set that the student scores (Rank-Surprisal Ratio)."""

CORE = ("tessy", "teacher-only")
SETS: dict[str, dict[str, Any]] = {
    **{method: {"method": method, **settings} for method, settings in reproduce.METHODS.items()},
    "every-5": {"switch": {"every": 5}},
    "entropy": {"switch": {"entropy": 1.0}},
    "student-accepts": {"switch": {"student-accepts": 0.1}},
    "likeliest": {"switch": {"name": "likeliest", "candidates": 4, "words": 5}},
    "tessy-best-of-5": {"best_of": 5, "verifier": demo.verify},
    **{f"{method}-{teacher}": {"method": method} for method in CORE for teacher in world.TEACHERS},
}
"""The settings of each set; those that end in the name of another teacher are written with it."""
RULES = ("every-5", "entropy", "student-accepts", "likeliest")
ELSEWHERE = ("student-only", "teacher-mix", "best-of-5", "teacher-answer", "teacher-think")
"""Sets that are only scored here: what their students learned is in RESULTS.md."""

FIGURES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "figure 6": tuple(("rows", "C", method) for method in ("tessy", "teacher-only", "student-only")),
    "figure 12": (("compare", "C", ""),),
    "figures 16, 17": (("compare", "C", ""),),
    "figure 11": (("fewer", "C", ""), ("tune", "C", "tessy"), ("tune", "C", "teacher-only")),
    "rules": tuple(("tune", "C", method) for method in (*CORE, *RULES)),
    "best-of-n": (("tune", "C", "tessy"), ("tune", "C", "tessy-best-of-5")),
    "figure 9": tuple(("tune", "C", method) for method in ("tessy", "tessy-teacher-answer", "teacher-only")),
    "RSR": (
        *(("rows", "C", method) for method in ELSEWHERE),
        *(("tune", "C", method) for method in (*CORE, *RULES, "tessy-best-of-5", "tessy-teacher-answer")),
        *(("tune", "C", f"{method}-{teacher}") for method in CORE for teacher in world.TEACHERS),
        ("tune", "C", "tessy of large"),
    ),
    "figure 10": (("tune", "C", "tessy"), ("tune", "C", "teacher-only"), ("system", "C", "teacher-only")),
    "figure 13": tuple((kind, "C", method) for kind in ("tune", "lora") for method in CORE),
    "figure 7": tuple(("tune", level, method) for level in ("base", "C") for method in CORE),
    "figure 15": tuple(("tune", level, method) for level in ("base", "C") for method in CORE),
    "figures 8, 14": (("compare", "C", ""), ("compare", "C", "related"), ("compare", "C", "other")),
    "on-policy": (
        ("tune", "C", "tessy-related"),
        *(("distill", "C", start) for start in ("", "tessy-related", "teacher-only-related")),
    ),
    "figure 5": tuple(
        ("tune", "C", f"{method}{teacher}") for teacher in ("", "-related", "-other") for method in CORE
    ),
    "figure 3": (("tune", "large", "tessy"), ("tune", "large", "teacher-only")),
    "figure 4": (
        ("tune", "C", "tessy"),
        ("tune", "C", "tessy of large"),
        ("tune", "large", "tessy"),
        ("tune", "large", "tessy of C"),
    ),
}
"""What each figure is made of, for each seed: kind, student and set. Shared units are done once."""


class Plan(dict[str, Unit]):
    """The units of some figures by name, each after those that it needs; sets have n rows."""

    def __init__(self, n: int = N) -> None:
        super().__init__()
        self.n = n

    def add(self, kind: str, level: str, seed: int, method: str, n: int = 0) -> str:
        """Add a unit and what it needs; return its name."""
        unit = Unit(kind, level, seed, method.replace(" ", "-"), n or self.n)
        if kind == "student":
            unit = replace(unit, method="", n=0)
        elif kind == "teacher":
            unit = replace(unit, level="", seed=0, n=0)
        elif kind == "fewer":
            unit = replace(unit, method="", n=0, needs=(self.add("student", level, seed, ""),))
        elif kind == "rows":
            unit = replace(unit, **self._rows(level, seed, method))
        elif kind == "compare":
            made = [f"{one}-{method}" if method else one for one in ("teacher-only", "tessy")]
            unit = replace(unit, needs=tuple(self.add("rows", level, seed, one) for one in (*made, "student-only")))
        elif kind == "distill":
            unit = replace(unit, needs=self._distilled(level, seed, method), n=self.n // 2 if method else self.n)
        else:
            made, _, by = method.partition(" of ")
            rows = self.add("rows", by or level, seed, made)
            unit = replace(unit, needs=(self.add("student", level, seed, ""), rows))
        self.setdefault(unit.name, unit)
        return unit.name

    def _rows(self, level: str, seed: int, method: str) -> dict[str, Any]:
        teacher = teacher_of(method)
        needs = (self.add("teacher", "", 0, teacher),) if teacher else ()
        if method.startswith("teacher-only"):  # one set for all students
            return {"level": "", "seed": 0, "needs": needs}
        return {"needs": (*needs, self.add("student", level, seed, ""))}

    def _distilled(self, level: str, seed: int, method: str) -> tuple[str, ...]:
        begun = self.add("tune", level, seed, method, self.n // 2) if method else self.add("student", level, seed, "")
        return begun, self.add("teacher", "", 0, "related")


def teacher_of(method: str) -> str:
    """Return the name of the other teacher that writes a set; none for the shipped one."""
    return next((teacher for teacher in world.TEACHERS if method.endswith(f"-{teacher}")), "")


def plan(seeds: Sequence[int], n: int = N) -> dict[str, list[str]]:
    """Return the names of the units that each figure shows."""
    return {name: figure_units(name, seeds, n)[1] for name in FIGURES}


def figure_units(name: str, seeds: Sequence[int], n: int = N) -> tuple[Plan, list[str]]:
    """Return all units that a figure needs, and the names of those that it shows."""
    found = Plan(n)
    shown = [found.add(kind, level, seed, method) for kind, level, method in FIGURES[name] for seed in seeds]
    return found, list(dict.fromkeys(shown))


# ---------------------------------------------------------------------------------------------------------------------
# The units
# ---------------------------------------------------------------------------------------------------------------------


def do_student(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Train a student, unless it is the shipped one, and examine it."""
    folder = reproduce.student_of(unit, out)
    if folder != demo.STUDENT:
        world.train_student(unit.level, unit.seed, scale.student_steps, folder)
    return {"examined": reproduce.examine(*reproduce.load(folder), scale)}


def do_fewer(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Examine a student on the prompts of :func:`epochs`, before it is fine-tuned."""
    return {"examined": reproduce.examine(*reproduce.load(reproduce.student_of(unit, out)), fewer(scale))}


def fewer(scale: Scale) -> Scale:
    """Return a scale with a third of the prompts in the examination."""
    return replace(scale, in_domain=scale.in_domain // 3, out_of_domain=scale.out_of_domain // 3)


def do_teacher(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Train a teacher with its predictors, and examine it."""
    folder = out / "teachers" / unit.method
    world.train_teacher(unit.method, scale.student_steps, folder)
    loaded = reproduce.load(folder / "teacher")
    return {"examined": reproduce.examine(*loaded, scale, world.TEACHERS[unit.method])}


def do_rows(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Write a set, and say what it is like."""
    settings: dict[str, Any] = {**SETS[unit.method], "seed": SYNTHESIS, "journal": None, "rows_in_flight": 256}
    if teacher := teacher_of(unit.method):
        settings["models"] = out / "teachers" / teacher
    prompts, student = demo.prompts(unit.n, seed=SYNTHESIS), reproduce.student_of(unit, out)
    with demo.transform(student=student, **settings) as transform:
        features = transform.features(prompts)
        rows = prompts.map(transform, batched=True, features=features, load_from_cache_file=False)
    reproduce.save_rows(rows, unit.name, out)
    found = {"set": reproduce.describe(rows, student), "by_limit": by_limit(rows, student)}
    return found | ({"surprise": surprise_of(rows, student)} if unit.method in ELSEWHERE else {})


def by_limit(rows: datasets.Dataset, student: Path) -> dict[str, float]:
    """Return the share of right rows had the thinking been limited: a row that is longer would have had no answer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    lengths = [len(ids) for ids in tokenizer(list(rows["thinking"]), add_special_tokens=False)["input_ids"]]
    right = [demo.verify(row) for row in rows]
    return {
        str(limit): sum(one and length <= limit for one, length in zip(right, lengths, strict=True)) / len(rows)
        for limit in LIMITS
    }


def do_compare(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Compare teacher-only, tessy and student-only rows of the same prompts with `tessy analyze`."""
    from tessy_hf.report.compare import analyze

    names = ("teacher-only", "tessy", "student-only")
    sets = {name: reproduce.read(made, out) for name, made in zip(names, unit.needs, strict=True)}
    found = analyze(sets, vocabulary(reproduce.student_of(unit, out)))
    found["pca"]["points"] = [points[::4] for points in found["pca"]["points"]]
    return {"compared": found}


def vocabulary(student: Path) -> Any:
    """Return a student's vocabulary."""
    from tessy_hf.text.vocabulary import Vocabulary

    return Vocabulary(transformers.AutoTokenizer.from_pretrained(student), str(student))


def surprise_of(rows: datasets.Dataset, student: Path) -> dict[str, Any]:
    """Return the Rank-Surprisal Ratio of a set under the student that is trained on it, before it is."""
    from tessy_hf.engines.scoring import Scorer, Surprise
    from tessy_hf.engines.transformers import TransformersEngine
    from tessy_hf.report.compare import with_surprise
    from tessy_hf.report.surprise import of_set

    some = rows.select(range(min(SCORED, len(rows))))
    scored, _ = with_surprise(some, vocabulary(student), Scorer(TransformersEngine(str(student))))
    pairs = zip(scored["student_surprisal"], scored["student_rank"], strict=True)
    return of_set(None if surprisal is None else Surprise(surprisal, rank, 0) for surprisal, rank in pairs)


def do_tune(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Fine-tune a student on a set: with all parameters, with LoRA, or under a system prompt of its own."""
    folder, rows = reproduce.student_of(unit, out), reproduce.read(unit.needs[1], out).select(range(unit.n))
    options: dict[str, Any] = {"logging_strategy": "steps", "logging_steps": max(1, scale.epochs * 16 // 36)}
    options |= OPTIONS[unit.kind]
    if (unit.kind, unit.level) == ("tune", "C") and unit.method in CORE:
        options |= {"save_strategy": "epoch", "save_only_model": True}
    with TemporaryDirectory(dir=out) as scratch:
        trainer = reproduce.fine_tune(folder, rows, scratch, num_train_epochs=scale.epochs, seed=unit.seed, **options)
        by_epoch = epochs(Path(scratch) / "model", trainer.state.global_step // scale.epochs, scale)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    if unit.kind == "tune":  # some go on by distillation
        keep(trainer.model, tokenizer, out / "tuned" / unit.name)
    author = replace(world.STUDENT, system=SYSTEM if unit.kind == "system" else "")
    return {
        "surprise": surprise_of(rows, folder),
        "by_epoch": by_epoch,
        "loss": [[one["epoch"], one["loss"]] for one in trainer.state.log_history if "loss" in one],
        "steps": trainer.state.global_step,
        "examined": reproduce.examine(trainer.model.eval(), tokenizer, scale, author),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "tune": {},
    "lora": {"use_peft": True, "lora_r": 8, "lora_alpha": 16},
    "system": {"system_prompt": SYSTEM},
}
"""What each kind of fine-tuning adds to recipes/sft/miniature.yaml; LoRA as in the paper's appendix A.5."""


def epochs(folder: Path, steps: int, scale: Scale) -> dict[str, Any]:
    """Examine the checkpoints of some epochs, on fewer prompts than at the end."""
    checkpoints = {epoch: folder / f"checkpoint-{epoch * steps}" for epoch in EPOCHS}
    return {
        str(epoch): reproduce.examine(*reproduce.load(checkpoint), fewer(scale))
        for epoch, checkpoint in checkpoints.items()
        if checkpoint.exists()
    }


def keep(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a fine-tuned student."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def do_distill(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Distil the related teacher on the student's own texts with TRL, at once or after a cold start."""
    from trl import DistillationConfig, DistillationTrainer

    student = out / "tuned" / unit.needs[0] if unit.method else reproduce.student_of(unit, out)
    prompts = demo.prompts(unit.n, seed=SYNTHESIS)["prompt"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(student)
    with TemporaryDirectory(dir=out) as scratch:
        trainer = DistillationTrainer(
            str(student),
            str(out / "teachers" / "related" / "teacher"),
            DistillationConfig(
                scratch,
                max_steps=scale.epochs * -(-unit.n // 32),  # as many as fine-tuning on so many rows takes
                learning_rate=3e-5,
                per_device_train_batch_size=min(32, unit.n),
                max_completion_length=192,
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                seed=unit.seed,
            ),
            datasets.Dataset.from_dict({"prompt": [miniature.AUTHORS["student"].messages(one) for one in prompts]}),
            processing_class=tokenizer,
        )
        trainer.train()
    examined = reproduce.examine(trainer.model.eval(), tokenizer, scale)
    return {"steps": trainer.state.global_step, "examined": examined}


DO: dict[str, reproduce.Do] = {
    "student": do_student,
    "fewer": do_fewer,
    "teacher": do_teacher,
    "rows": do_rows,
    "compare": do_compare,
    "tune": do_tune,
    "lora": do_tune,
    "system": do_tune,
    "distill": do_distill,
}


def quick_scale() -> Scale:
    """Return a scale at which each unit takes seconds."""
    return Scale(student_steps=8, epochs=1, in_domain=6, out_of_domain=3, judged=0)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/paper"), help="folder of the units")
    parser.add_argument("--report", type=Path, help="where the page goes; by default PAPER.md in --out")
    parser.add_argument("--jobs", type=int, default=2, help="units done at the same time, of one core each")
    parser.add_argument("--figures", nargs="+", choices=FIGURES, default=list(FIGURES), help="by default all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the students")
    parser.add_argument("--write", action="store_true", help="only write the page from the units that are there")
    parser.add_argument("--quick", action="store_true", help="tiny units, to see that it works")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    out = args.out.resolve()
    (out / "units").mkdir(parents=True, exist_ok=True)
    scale, n = (quick_scale(), reproduce.QUICK) if args.quick else (Scale(), N)
    reproduce.keep_scale(scale, out)
    os.environ["HF_DATASETS_CACHE"] = str(out / "cache")  # inherited by the processes of the pool
    units: dict[str, Unit] = {}
    for name in () if args.write else args.figures:
        units |= {key: unit for key, unit in figure_units(name, args.seeds, n)[0].items() if key not in units}
    reproduce.execute(list(units.values()), out, scale, args.jobs, DO)
    figures.write(out, args.report or out / "PAPER.md", plan(args.seeds, n))


if __name__ == "__main__":
    main()
