"""Collect prompts: public datasets stream in, the questions that a model picks come out, each once.

    python recipes/prompts/collect.py recipes/prompts/contest.yaml output/prompts.parquet

Of each source's rows only the question is taken, the answer never. Equal questions become one, with the number of its
copies; so do near-duplicates, and questions of evaluation sets are dropped, where the recipe says so. Then a model is
asked whether a question is of the wanted kind. The asking is a run of ``teacher-only`` like any other: on any engine,
with a journal, so that the same command goes on where it stopped. A card beside the prompts says what became of all.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, load_dataset
from jinja2 import Environment, StrictUndefined

from tessy_hf import Speaker, TessyTransform
from tessy_hf.recipe import build


def main() -> None:
    """Read a recipe, collect, and say what became of the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path, help="a .parquet file with id, question, source and copies")
    given = parser.parse_args()
    recipe = yaml.safe_load(given.recipe.read_text(encoding="utf-8"))
    judge, settings = read_judge(recipe, given.recipe)
    instruction = given.recipe.with_name(recipe["instruction"]).read_text(encoding="utf-8")
    cleaning = {name: recipe.get(name) for name in ("near_duplicates", "decontaminate")}
    prompts, counts = collect(recipe["sources"], judge, instruction, recipe["rows"], settings, **cleaning)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    prompts.to_parquet(given.out)
    write_card(given.out, recipe, len(prompts), counts)
    print(f"{len(prompts)} prompts in {given.out}; " + ", ".join(f"{name}: {n}" for name, n in counts.items()))


def read_judge(recipe: Mapping[str, Any], path: Path) -> tuple[Speaker, dict[str, Any]]:
    """Return the model that is asked, and the settings of the asking."""
    judge, _, settings = build({**recipe["ask"], "teacher": recipe["judge"], "student": recipe["judge"]}, path)
    return judge, settings


def collect(
    sources: Iterable[Mapping[str, Any]],
    judge: Speaker,
    instruction: str,
    rows: int,
    settings: Mapping[str, Any],
    near_duplicates: Mapping[str, Any] | None = None,
    decontaminate: Mapping[str, Any] | None = None,
) -> tuple[Dataset, Counter[str]]:
    """Return at most so many prompts, drawn at random from those that are picked, and what became of all rows."""
    counts = Counter[str]()
    template = Environment(undefined=StrictUndefined, autoescape=False).from_string(instruction)
    found = unique(sources, counts)
    if decontaminate is not None:
        found = list(uncontaminated(found, counts, **decontaminate))
    if near_duplicates is not None:
        found = distinct(found, counts, **near_duplicates)
    asked = Dataset.from_list(found).map(lambda row: {"asked": template.render(question=row["question"])})
    given = {"method": "teacher-only", "prompt_column": "asked", "id_column": "id", **settings}
    with TessyTransform(teacher=judge, student=judge, **given) as transform:
        judged = asked.map(transform, batched=True, features=transform.features(asked))
    verdicts = [verdict(row) for row in judged.select_columns(["answer", "finish_reason"])]
    counts.update(verdicts)
    picked = judged.select([index for index, said in enumerate(verdicts) if said == "yes"])
    drawn = picked.shuffle(seed=transform.settings.seed).select(range(min(rows, len(picked))))
    return drawn.select_columns(["id", "question", "source", "copies"]), counts


def unique(sources: Iterable[Mapping[str, Any]], counts: Counter[str]) -> list[dict[str, Any]]:
    """Read all sources; keep each question once, as it first was."""
    found: dict[str, dict[str, Any]] = {}
    for source in sources:
        stream = load_dataset(**source["load"], streaming=True)
        for row in islice(stream, source.get("limit")):
            counts["rows"] += 1
            question = first_question(row[source["prompt"]]) if fits(row, source.get("where", {})) else ""
            if not question:
                continue
            key = hashlib.sha256(plain(question).encode("utf-8", "surrogatepass")).hexdigest()[:16]
            new = {"id": key, "question": question, "source": source["load"]["path"], "copies": 0}
            found.setdefault(key, new)["copies"] += 1
    counts["questions"] = sum(row["copies"] for row in found.values())
    counts["unique questions"] = len(found)
    return list(found.values())


def uncontaminated(
    rows: Iterable[dict[str, Any]], counts: Counter[str], sets: Iterable[Mapping[str, Any]], words: int = 13
) -> Iterator[dict[str, Any]]:
    """Yield the questions that share no ``words`` words in a row with one of an evaluation set.

    Shorter questions of evaluation sets are looked for whole.
    """
    known: dict[str, str] = {}
    for one in sets:
        for row in load_dataset(**one["load"], streaming=True):
            for run in runs(first_question(row[one["prompt"]]), words):
                known.setdefault(run, one["load"]["path"])
    for row in rows:
        name = next((known[run] for run in runs(row["question"], words) if run in known), None)
        if name is None:
            yield row
        else:
            counts[f"in {name}"] += 1


def distinct(
    rows: Iterable[dict[str, Any]], counts: Counter[str], similarity: float = 0.8, words: int = 5
) -> list[dict[str, Any]]:
    """Keep the first of the questions that are alike: by MinHash, of the runs of so many words at least this share."""
    from datasketch import MinHash, MinHashLSH

    index, kept = MinHashLSH(threshold=similarity, num_perm=128), dict[str, tuple[MinHash, dict[str, Any]]]()
    for row in rows:
        sketch = MinHash(num_perm=128)
        sketch.update_batch([run.encode("utf-8", "surrogatepass") for run in runs(row["question"], words)])
        alike = {key: kept[key][0].jaccard(sketch) for key in index.query(sketch)}
        nearest = max(alike, key=lambda key: alike[key], default=None)
        if nearest is not None and alike[nearest] >= similarity:
            kept[nearest][1]["copies"] += row["copies"]
            counts["near-duplicates"] += 1
        else:
            index.insert(row["id"], sketch)
            kept[row["id"]] = sketch, row
    return [row for _, row in kept.values()]


def runs(text: str, words: int) -> set[str]:
    """Return all runs of so many words of a text; the whole text where it is shorter."""
    said = plain(text).split()
    return {" ".join(said[at : at + words]) for at in range(max(1, len(said) - words + 1))} - {""}


def write_card(out: Path, recipe: Mapping[str, Any], rows: int, counts: Mapping[str, int]) -> None:
    """Write a dataset card beside the prompts, unless a card that this script did not write is there."""
    card, mark = out.with_name("README.md"), "<!-- made by collect.py -->"
    if card.exists() and mark not in card.read_text(encoding="utf-8"):
        print(f"{card} is not of this script and stays as it is")
        return
    head = {"configs": [{"config_name": "default", "data_files": out.name}], "tags": ["prompts"]}
    sources = ", ".join(f"`{source['load']['path']}`" for source in recipe["sources"])
    lines = [f"| {name} | {count:,} |" for name, count in {**counts, "kept": rows}.items()]
    table = "\n".join(["| | rows |", "| --- | ---: |", *lines])
    text = f"Questions from {sources}, without their answers. What became of the rows:"
    cleaning = {name: recipe[name] for name in ("decontaminate", "near_duplicates") if recipe.get(name)}
    told = f"\n\nCleaned with:\n\n```yaml\n{yaml.safe_dump(cleaning)}```" if cleaning else ""
    whole = f"---\n{yaml.safe_dump(head)}---\n\n{mark}\n# Prompts\n\n{text}\n\n{table}{told}\n"
    card.write_text(whole, encoding="utf-8")


def fits(row: Mapping[str, Any], where: Mapping[str, Any]) -> bool:
    """Say whether a row has the values that its source asks for."""
    return all(row[column] == value for column, value in where.items())


def first_question(prompt: Any) -> str:
    """Return the text of a prompt, or what the user first says in a chat."""
    if isinstance(prompt, str):
        return prompt.strip()
    for message in prompt or ():
        if message.get("role", message.get("from")) in ("user", "human"):
            return (message.get("content", message.get("value")) or "").strip()
    return ""


def plain(text: str) -> str:
    """Return a text without what does not tell questions apart: case, spacing, punctuation, forms of a letter."""
    return " ".join(re.findall(r"\w+|[^\w\s.,;:!?]", unicodedata.normalize("NFKC", text).casefold()))


def verdict(row: Mapping[str, Any]) -> str:
    """Read a judge's answer: ``yes`` or ``no`` alone; all else is counted and not guessed."""
    if row["finish_reason"] != "stop":
        return str(row["finish_reason"])
    answer = row["answer"].strip().strip(".").lower()
    return answer if answer in ("yes", "no") else "unclear"


if __name__ == "__main__":
    main()
