"""The paper's main table in miniature: students are trained, taught by each data recipe, and examined.

In: seeds. Out: one small JSON file for each unit of work, and tables of them.

    python recipes/miniature/reproduce.py --out output/reproduce

A unit is a student (trained, examined), a set of rows (synthesised), or a student fine-tuned on a set (examined). One
whose file is there is not done again, so a run that was stopped goes on when it is started again. All settings were
fixed before the first run; nothing is chosen by what the examination says.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import datasets
import results
import torch
import train as miniature
import transformers

from tessy_hf import demo
from tessy_hf.demo.world import FAMILIES, Problem, make_problem
from tessy_hf.errors import SettingsError

log = logging.getLogger("reproduce")

ROOT = Path(__file__).resolve().parents[2]
SYNTHESIS, EVALUATION = 1, 2  # seeds of the prompts that rows are written for, and of those that are only examined

METHODS: dict[str, dict[str, Any]] = {
    "tessy": {},
    "tessy-teacher-answer": {},
    "teacher-only": {},
    "teacher-think": {},
    "teacher-answer": {},
    "teacher-mix": {},
    "student-only": {},
    "best-of-5": {"method": "student-only", "best_of": 5, "verifier": demo.verify},
    "teacher-reference": {},
}
"""What is trained on. ``teacher-score`` is tried beside, for these models cannot judge; best-of-5 stands in for it."""
CORE = ("tessy", "teacher-only", "teacher-think", "teacher-answer", "student-only")
SCALED = ("tessy", "teacher-only", "student-only")
"""The methods whose set is tried in other sizes."""
MAIN = 500
"""The size of the sets of the main table."""
QUICK = 8
"""The size of the sets of a trial."""
LEVELS = ("C", "M", "B")


@dataclass(frozen=True)
class Scale:
    """How much work a unit is. A run goes on only with what was done at the same scale."""

    student_steps: int = 1700
    epochs: int = 9
    in_domain: int = 400
    """Prompts of calc in the examination."""
    out_of_domain: int = 200
    """Prompts of each other family."""
    judged: int = 40
    """Rows on which teacher-score is tried."""


@dataclass(frozen=True)
class Unit:
    """A piece of work, done once its file is there."""

    kind: str
    """student, rows, judge or tune."""
    level: str = ""
    """The exposure of the student; of rows that no student has a part in, none."""
    seed: int = 0
    """Of the student, and of its fine-tuning."""
    method: str = ""
    n: int = 0
    needs: tuple[str, ...] = ()
    """Names of the units that come before."""

    @property
    def name(self) -> str:
        """The file's name."""
        who = f"{self.level}-{self.seed}" if self.level else ""
        return "-".join(part for part in (self.kind, who, self.method, str(self.n or "")) if part)


def plan(levels: Sequence[str], seeds: Sequence[int], sizes: Sequence[int], methods: Sequence[str]) -> list[Unit]:
    """List the units, in the order in which they are begun where nothing hinders.

    Args:
        levels: Exposures of the students.
        seeds: Of the students.
        sizes: Of the sets; those other than the main one only at C, for some methods.
        methods: At all levels; if none are given, all at C and the core elsewhere.
    """
    units: dict[str, Unit] = {}

    def add(*given: Any) -> str:
        unit = Unit(*given)
        units.setdefault(unit.name, unit)
        return unit.name

    for level in levels:
        chosen = methods or (METHODS if level == "C" else CORE)
        wanted = {method: [n for n in sizes if n == MAIN or (level == "C" and method in SCALED)] for method in chosen}
        students = {seed: add("student", level, seed) for seed in seeds}
        for method, its_sizes in wanted.items():
            for seed in seeds if its_sizes else ():
                whose, most, needs = (level, seed), max(its_sizes), (students[seed],)
                if method == "teacher-only":  # written once for all students, of the size that C wants
                    whose, most, needs = ("", 0), max(n for n in sizes if n == MAIN or "C" in levels), ()
                rows = add("rows", *whose, method, most, needs)
                for n in its_sizes:
                    add("tune", level, seed, method, n, (students[seed], rows))
    alone = [one for one in units.values() if (one.kind, one.level, one.method) == ("rows", "C", "student-only")]
    for ready in alone[:1]:
        add("judge", ready.level, ready.seed, "teacher-score", 0, (ready.name,))
    return sorted(units.values(), key=lambda unit: unit.kind == "tune" and unit.n != MAIN)  # the main table first


# ---------------------------------------------------------------------------------------------------------------------
# The units
# ---------------------------------------------------------------------------------------------------------------------


def student_of(unit: Unit, out: Path) -> Path:
    """Return the folder of a unit's student. The shipped one is that of C with seed 0."""
    if (unit.level, unit.seed) in (("C", 0), ("", 0)):
        return demo.STUDENT
    return out / "students" / f"{unit.level}-{unit.seed}"


def rows_of(name: str, out: Path) -> Path:
    """Return the file of a set."""
    return out / "rows" / f"{name}.parquet"


def examination(scale: Scale) -> dict[str, list[Problem]]:
    """Return the problems of the examination by family: none twice, and none that rows may be written for."""
    seen = {row["prompt"] for row in demo.prompts(10_000, seed=SYNTHESIS)}
    chosen: dict[str, list[Problem]] = {}
    for family in FAMILIES:
        wanted = scale.in_domain if family == "calc" else scale.out_of_domain
        chosen[family], number = [], 0
        while len(chosen[family]) < wanted:
            problem = make_problem(family, Random(f"prompts-{family}-{EVALUATION}-{number}"))
            number += 1
            if problem.prompt not in seen:
                seen.add(problem.prompt)
                chosen[family].append(problem)
    return chosen


def examine(
    model: Any, tokenizer: Any, scale: Scale, author: miniature.Author = miniature.AUTHORS["student"]
) -> dict[str, dict[str, float]]:
    """Return the share of right answers and the tokens written, by family, at temperature 0.6."""
    return {
        family: miniature.accuracy(model, tokenizer, author, problems)
        for family, problems in examination(scale).items()
    }


def load(folder: Path) -> tuple[Any, Any]:
    """Load a student and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def do_student(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Train a student, unless it is the shipped one, and examine it."""
    folder = student_of(unit, out)
    if folder != demo.STUDENT:
        tokenizer = miniature.make_tokenizer(miniature.AUTHORS["student"])
        model, _ = miniature.train_student(tokenizer, unit.level, unit.seed, scale.student_steps)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {"examined": examine(*load(folder), scale)}


def synthesize(unit: Unit, out: Path, method: str, n: int) -> datasets.Dataset:
    """Write the rows of n prompts. A row depends on its prompt and the seed alone: longer sets begin with shorter."""
    prompts = demo.prompts(n, seed=SYNTHESIS)
    settings = {"method": method, **METHODS.get(method, {}), "seed": SYNTHESIS, "journal": None, "rows_in_flight": 256}
    with demo.transform(student=student_of(unit, out), **settings) as transform:
        features = transform.features(prompts)
        return prompts.map(transform, batched=True, features=features, load_from_cache_file=False)


def do_rows(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Write a set."""
    save_rows(synthesize(unit, out, unit.method, unit.n), unit.name, out)
    return {}


def save_rows(rows: datasets.Dataset, name: str, out: Path) -> None:
    """Write a set to its file."""
    path = rows_of(name, out)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path.with_suffix(".part"))
    path.with_suffix(".part").replace(path)


def do_judge(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Let the teacher score candidates, and see how many of its judgements are scores."""
    rows = synthesize(unit, out, unit.method, scale.judged)
    alone = read(unit.needs[0], out).select(range(scale.judged))
    candidates = [candidate for row in rows["candidates"] for candidate in row]
    return {
        "judgements": sum(candidate["judgement"] is not None for candidate in candidates),
        "scores": sum(candidate["score"] is not None for candidate in candidates),
        "rows": scale.judged,
        "as_student_only": sum(a == b for a, b in zip(rows["messages"], alone["messages"], strict=True)),
    }


def do_tune(unit: Unit, out: Path, scale: Scale) -> dict[str, Any]:
    """Fine-tune a student on the first n rows of a set with recipes/sft, and examine it."""
    folder = student_of(unit, out)
    rows = read(unit.needs[1], out).select(range(unit.n))
    described = describe(rows, folder)
    if not described["complete"]:
        return {"set": described}
    with TemporaryDirectory(dir=out) as scratch:
        trainer = fine_tune(folder, rows, scratch, num_train_epochs=scale.epochs, seed=unit.seed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    steps = trainer.state.global_step
    return {"set": described, "steps": steps, "examined": examine(trainer.model.eval(), tokenizer, scale)}


def fine_tune(student: Path, rows: datasets.Dataset, scratch: str, **options: Any) -> Any:
    """Fine-tune a student on rows with recipes/sft; the model is written to the folder ``model`` of ``scratch``."""
    rows.to_parquet(f"{scratch}/rows.parquet")
    changes = {
        "model_name_or_path": student,
        "data": f"{scratch}/rows.parquet",
        "output_dir": f"{scratch}/model",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **options,
    }
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value))]
    return sft().main(["--config", str(ROOT / "recipes/sft/miniature.yaml"), *words])


def read(name: str, out: Path) -> datasets.Dataset:
    """Read a set."""
    return datasets.load_dataset("parquet", data_files=str(rows_of(name, out)), split="train")


def describe(rows: datasets.Dataset, student: Path) -> dict[str, float]:
    """Tell what a set is like: right and complete rows, tokens, the teacher's share of them, likelihood."""
    teacher, own = sum(rows["teacher_tokens"]), sum(rows["student_tokens"])
    complete = rows.filter(lambda reason: reason == "stop", input_columns="finish_reason")
    return {
        "right": sum(map(demo.verify, rows)) / len(rows),
        "complete": len(complete) / len(rows),
        "tokens": (teacher + own) / len(rows),
        "teacher_share": teacher / (teacher + own),
        "nll": likelihood(complete["messages"], *load(student)) if len(complete) else float("nan"),
    }


@torch.no_grad()
def likelihood(conversations: Sequence[Any], model: Any, tokenizer: Any, size: int = 50) -> float:
    """Return the negative log-likelihood of what is trained on under the student, in nats a token."""
    total = count = 0.0
    tokenizer.padding_side = "right"
    for start in range(0, len(conversations), size):
        tokens = tokenizer.apply_chat_template(
            list(conversations[start : start + size]),
            padding=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
        )
        logits = model(tokens["input_ids"]).logits[:, :-1].log_softmax(-1)
        losses = -logits.gather(-1, tokens["input_ids"][:, 1:, None])[..., 0]
        trained = torch.as_tensor(tokens["assistant_masks"])[:, 1:]
        total, count = total + float((losses * trained).sum()), count + float(trained.sum())
    return total / count


def sft() -> ModuleType:
    """Return recipes/sft/train.py, imported as a script in that folder is."""
    name, folder = "sft_train", ROOT / "recipes" / "sft"
    if name not in sys.modules:
        sys.path.append(str(folder))
        spec = importlib.util.spec_from_file_location(name, folder / "train.py")
        assert spec and spec.loader
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


Do = Callable[[Unit, Path, Scale], dict[str, Any]]
DO: dict[str, Do] = {
    "student": do_student,
    "rows": do_rows,
    "judge": do_judge,
    "tune": do_tune,
}

# ---------------------------------------------------------------------------------------------------------------------
# Doing them
# ---------------------------------------------------------------------------------------------------------------------


def record_of(unit: Unit, out: Path) -> Path:
    """Return the file that says that a unit is done, and what came of it."""
    return out / "units" / f"{unit.name}.json"


def work(do: Do, unit: Unit, out: Path, scale: Scale, commit: str) -> float:
    """Do a unit in this process; its file is there as a whole or not at all. Returns the seconds of processor time."""
    wall, processor = time.monotonic(), time.process_time()
    found = do(unit, out, scale)
    seconds = {"seconds": time.monotonic() - wall, "processor_seconds": time.process_time() - processor}
    told = {"ended": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit, "versions": versions()}
    part = record_of(unit, out).with_suffix(".part")
    part.write_text(json.dumps({**asdict(unit), **found, **seconds, **told}, indent=1) + "\n")
    part.replace(record_of(unit, out))
    return seconds["processor_seconds"]


def execute(units: Sequence[Unit], out: Path, scale: Scale, jobs: int, do: Mapping[str, Do] = DO) -> None:
    """Do what is not done yet, each unit after those it needs."""
    commit = commit_of(ROOT)
    todo = [unit for unit in units if not record_of(unit, out).exists()]
    log.info("%d of %d units to do", len(todo), len(units))
    done = {unit.name for unit in units} - {unit.name for unit in todo}
    running: dict[Any, Unit] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=prepare) as pool:
        while todo or running:
            for unit in [unit for unit in todo if done.issuperset(unit.needs)][: jobs - len(running)]:
                todo.remove(unit)
                running[pool.submit(work, do[unit.kind], unit, out, scale, commit)] = unit
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                unit = running.pop(future)
                log.info(
                    "%s: %.0f s of processor time, %d to go", unit.name, future.result(), len(todo) + len(running)
                )
                done.add(unit.name)


def prepare() -> None:
    """Make a process of the pool quiet, and one of one thread."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it makes fine-tuning take more than twice as long
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()


def versions() -> dict[str, str]:
    """Return the versions of what computes."""
    names = ("torch", "transformers", "trl", "datasets")
    return {"python": sys.version.split()[0], **{name: version(name) for name in names}}


def commit_of(folder: Path) -> str:
    """Return the commit of a checkout, with "+" where files differ from it; "unknown" outside of one."""
    try:
        told = [
            subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=10", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return told[0] + "+" * bool(told[1])


def keep_scale(scale: Scale, out: Path) -> None:
    """Write the scale down, or see that it is the one written down.

    Raises:
        SettingsError: The folder holds units of another scale.
    """
    path, told = out / "scale.json", json.dumps(asdict(scale), indent=1) + "\n"
    if path.exists() and path.read_text() != told:
        raise SettingsError(f"{out} holds units of another scale, see {path}. Pass another folder with --out.")
    path.write_text(told)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("output/reproduce"), help="folder of the units")
    parser.add_argument("--report", type=Path, help="where the tables go; by default RESULTS.md in --out")
    parser.add_argument("--jobs", type=int, default=2, help="units done at the same time, of one core each")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of the students")
    parser.add_argument("--sizes", nargs="+", type=int, default=[125, 250, MAIN, 2000], help="rows trained on")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[], help="by default all at C, else the core")
    parser.add_argument("--quick", action="store_true", help="one tiny unit of each kind, to see that it works")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    scale, units = Scale(), plan(args.levels, args.seeds, args.sizes, args.methods)
    if args.quick:
        scale, units = Scale(student_steps=8, epochs=1, in_domain=8, out_of_domain=2, judged=2), quick()
    out = args.out.resolve()
    (out / "units").mkdir(parents=True, exist_ok=True)
    keep_scale(scale, out)
    os.environ["HF_DATASETS_CACHE"] = str(out / "cache")  # inherited by the processes of the pool
    execute(units, out, scale, args.jobs)
    results.write(out, args.report or out / "RESULTS.md", QUICK if args.quick else MAIN)


def quick() -> list[Unit]:
    """Return one unit of each kind: a student that hardly learns, and sets of the shipped one."""
    students = [Unit("student", "M", 0), Unit("student", "C", 0)]
    methods = {"tessy": ("C", 0), "teacher-only": ("", 0), "student-only": ("C", 0)}
    rows = [Unit("rows", *whose, method, QUICK, ("student-C-0",)) for method, whose in methods.items()]
    tunes = [Unit("tune", "C", 0, one.method, QUICK, ("student-C-0", one.name)) for one in rows[:2]]
    return [*students, *rows, *tunes, Unit("judge", "C", 0, "teacher-score", 0, (rows[-1].name,))]


if __name__ == "__main__":
    main()
