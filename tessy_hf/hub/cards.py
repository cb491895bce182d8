"""Render the card of a released dataset: numbers and manifest go in, a card comes out, the user's edits kept.

The text is made of parts, each between two marks. A part that nobody changed since it was rendered is rendered again;
a part that the user changed, and all text outside the marks, stays. Text from models, servers and users is escaped.
Reads and writes nothing.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import quote

import yaml

from tessy_hf.errors import DatasetError
from tessy_hf.hub import layout
from tessy_hf.report import heat
from tessy_hf.report.tables import Table, count, percent, tables
from tessy_hf.rows.columns import COLUMNS

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard, DatasetCardData
    from jinja2 import Environment

    from tessy_hf.manifest import Manifest, ModelRecord, SourceRecord

CARD = Path(__file__).with_name("templates") / "dataset_card.md"

TAGS = ("tessy", "synthetic", "reasoning", "sft")
"""Tags of every dataset written with this package."""

SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M", "10M<n<100M", "100M<n<1B", "1B<n<10B")
"""The Hub's size categories, each ten times the one before, from a thousand rows on."""

_PART = re.compile(
    r"^<!-- tessy:(?P<name>\w+) (?P<digest>\w{8}) -->\n(?P<text>.*?)\n<!-- /tessy:(?P=name) -->$", re.M | re.S
)
_HEAD = re.compile(r"\s*---\r?\n.*?\n---\r?\n\s*", re.S)
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def dataset_card(
    summary: dict[str, Any],
    manifest: Manifest,
    repo_id: str,
    previous: str | None = None,
    *,
    figures: Mapping[str, str] | None = None,
    other_splits: Mapping[str, layout.Info] | None = None,
    language: Iterable[str] = (),
) -> DatasetCard:
    """Write the card of a release.

    Args:
        summary: The numbers of all its rows, see :meth:`tessy_hf.report.statistics.Statistics.summary`.
        manifest: Its manifest.
        repo_id: The dataset on the Hub.
        previous: The card that is there now; its own text, metadata and other configurations are kept.
        figures: Paths in the repository of the figures to show, with a description of each.
        other_splits: Sizes of other splits of the configuration that the present card does not give.
        language: The rows' languages, where they are not those of the present card.

    Returns:
        The card. Its metadata is what was there, with license (where one was given), tags, size, and the files and
        columns of this configuration brought up to date.
    """
    data, body = read_card(previous and with_part(previous, "live", None))
    _update(data, manifest, other_splits)
    data.language = list(language) or data.language
    parts = render_parts(
        CARD.read_text(encoding="utf-8"),
        summary=summary,
        tables=tables(summary),
        manifest=manifest,
        repo_id=repo_id,
        tag=f"v{manifest.version}",
        licenses=_licenses(data),
        alternates=all(method.startswith("tessy") for method in summary["methods"]) and bool(summary["methods"]),
        rules=_rules(manifest),
        own_columns=[
            feature["name"] for feature in manifest.features if feature["name"] not in (*COLUMNS, *heat.COLUMNS)
        ],
        incomplete=summary["rows"] - summary["finish_reasons"].get("stop", 0),
        counts_failed=0 < manifest.counts.failed == summary["rows"] - manifest.counts.rows,
        figures=[{"path": path, "description": description} for path, description in (figures or {}).items()],
    )
    return make_card(data, merge(body, parts))


def _rules(manifest: Manifest) -> list[str]:
    """Return the rules of who writes next, with their numbers, where they are not the boundary predictors'."""
    given = [switch for run in manifest.runs if isinstance(switch := run.settings.get("switch"), Mapping)]
    others = [rule for rule in given if rule.get("name") != "predictor"]
    return sorted({", ".join(f"{name}={value}" for name, value in rule.items()) for rule in others})


def size_category(rows: int) -> str:
    """Return the Hub's size category of a number of rows."""
    return next((size for power, size in enumerate(SIZES) if rows < 1000 * 10**power), "n>1T")


# --- the metadata


def read_card(previous: str | None) -> tuple[DatasetCardData, str]:
    """Return the metadata and the text of a card, if there is one.

    Raises:
        DatasetError: Its metadata is not valid YAML.
    """
    from huggingface_hub import DatasetCard, DatasetCardData

    if previous is None or not previous.strip():
        return DatasetCardData(), ""
    text = previous.replace("\r\n", "\n")
    try:
        card = DatasetCard(text if text.lstrip().startswith("---\n") else f"---\n{{}}\n---\n{text}")
    except (yaml.YAMLError, ValueError) as error:
        raise DatasetError(
            f"The metadata of the dataset's card cannot be read: {error} YAML between two lines of --- is expected; "
            "fix the card, or push to another repository."
        ) from error
    return cast("DatasetCardData", card.data), card.text


def _update(data: DatasetCardData, manifest: Manifest, other_splits: Mapping[str, layout.Info] | None) -> None:
    """Update the metadata; what the user wrote there, and other configurations, stay."""
    given = manifest.license.model_dump(exclude_none=True) if manifest.license.license else {}
    for name, value in given.items():
        data[name] = value
    data.task_categories = data.task_categories or ["text-generation"]
    data.annotations_creators = data.annotations_creators or ["machine-generated"]
    data.language_creators = data.language_creators or ["machine-generated"]
    methods = sorted({run.method for run in manifest.runs if run.method})
    data["tags"] = _united(data.get("tags"), (*TAGS, *(method for method in methods if method != "tessy")))
    if prompts := [source.id for source in sources(manifest) if source.id]:
        data.source_datasets = _united(data.source_datasets, prompts)
    layout.update(data, manifest, other_splits)
    data.size_categories = [size_category(layout.rows_on_card(data))]


def sources(manifest: Manifest) -> list[SourceRecord]:
    """Return the prompts of a release that are datasets on the Hub."""
    given = [run.source for run in manifest.runs if run.source is not None]
    return [source for source in given if source.id and _REPO.fullmatch(source.id)]


def languages(card: str | None) -> list[str]:
    """Return the languages that a card states."""
    return [name for name in _united(read_card(card)[0].language, ()) if isinstance(name, str)]


def _licenses(data: DatasetCardData) -> list[str]:
    """Return the license that the card states, by its own name where it has one, and its URL."""
    stated = data.get("license_name") or data.license or []
    return [*_united(stated, ()), *filter(None, [data.get("license_link")])]


def _united(given: Any, ours: Iterable[str]) -> list[str]:
    there = [given] if isinstance(given, str) else list(given or [])
    return [*there, *(name for name in ours if name not in there)]


# --- the text


def merge(body: str, parts: Mapping[str, str]) -> str:
    """Replace the parts of a card's text that nobody changed since they were rendered.

    Args:
        body: The text as it is, without its metadata.
        parts: The parts by name, in the order of a new card.

    Returns:
        The text. New parts come after those that are there; in a text without any they come first.
    """
    left = dict(parts)

    def again(part: re.Match[str]) -> str:
        new = left.pop(part["name"], None)
        if part["digest"] != _digest(part["text"]):
            return part[0]  # changed by hand
        return _marked_part(part["name"], new) if new is not None else ""

    if not _PART.search(body):
        own = body.strip()
        return "\n\n".join(_marked_part(name, text) for name, text in parts.items()) + (f"\n\n{own}" if own else "")
    merged = _PART.sub(again, body).strip()
    return "\n\n".join([merged, *(_marked_part(name, text) for name, text in left.items())])


def with_part(card: str, name: str, text: str | None) -> str:
    """Return a card with one part replaced, whoever changed it, put before its text, or removed (``None``).

    Every other byte stays.
    """
    marked = "" if text is None else _marked_part(name, text) + "\n\n"
    there = next((part for part in _PART.finditer(card) if part["name"] == name), None)
    head = _HEAD.match(card)
    start, end = there.span() if there is not None else (head.end(), head.end()) if head else (0, 0)
    end += 2 if there is not None and card.startswith("\n\n", end) else 0
    return card[:start] + marked + card[end:]


def _marked_part(name: str, text: str) -> str:
    return f"<!-- tessy:{name} {_digest(text)} -->\n{text}\n<!-- /tessy:{name} -->"


def _digest(text: str) -> str:
    return hashlib.sha256("\n".join(line.rstrip() for line in text.strip().split("\n")).encode()).hexdigest()[:8]


def make_card(data: DatasetCardData, body: str) -> DatasetCard:
    """Return a card of its metadata and its text."""
    from huggingface_hub import DatasetCard

    return DatasetCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def render_parts(template: str, **fields: Any) -> dict[str, str]:
    """Render each block of a card's template, by name; a missing field is an error.

    Every value is shown as text, never as markup, unless a filter of :func:`_environment` made it :class:`Markdown`.
    """
    loaded = _environment().from_string(template)
    context = loaded.new_context(fields)
    return {name: _tidy("".join(block(context))) for name, block in loaded.blocks.items()}


def _tidy(text: str) -> str:
    return re.sub(r"\n{3,}", "\n\n", text.strip())


@cache
def _environment() -> Environment:
    """Return the environment of the cards' templates, with their filters."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, finalize=_inert, autoescape=False)  # noqa: S701 - Markdown
    environment.filters.update(
        code=code,
        cell=partial(code, cell=True),
        count=lambda value: Markdown(count(value)),
        percent=lambda value: Markdown(html.escape(percent(value))),
        python=lambda value: Markdown(json.dumps(value, ensure_ascii=False)),
        json=lambda value: Markdown(json.dumps(value, indent=2, ensure_ascii=False)),
        model=lambda name: _link(name, "https://huggingface.co/", cell=True),
        dataset=lambda name: _link(name, "https://huggingface.co/datasets/"),
        revision=_revision,
        link=_link,
        url=lambda path: Markdown(quote(path)),
        grid=_grid,
        lines=lambda text: Markdown("<br>".join(map(_inert, str(text).strip().splitlines()))),
        join_codes=lambda names: Markdown(", ".join(map(code, names))),
    )
    return environment


class Markdown(str):
    """Text that goes onto a card unescaped."""


def code(text: Any, cell: bool = False) -> Markdown:
    """Return any text as a code span on one line: nothing in it is markup or a link.

    Args:
        text: The text.
        cell: Whether it is in a table, where a bar would end the cell.
    """
    line = " ".join(re.sub(r"[\x00-\x1f\x7f\u2028\u2029]", " ", str(text)).split()) or " "
    fence = "`" * (1 + max(map(len, re.findall("`+", line)), default=0))
    space = " " if line[0] == "`" or line[-1] == "`" or len(fence) > 1 else ""
    span = f"{fence}{space}{line}{space}{fence}"
    return Markdown(span.replace("|", "\\|") if cell else span)


def _inert(value: Any) -> Markdown:
    """Escape a value: every character that could be markup becomes an entity."""
    if isinstance(value, Markdown):
        return value
    if value is None:
        raise ValueError("A field of the card is None. The template has to say what is shown in its place.")
    line = " ".join(str(value).split())
    return Markdown(re.sub(r"[^\w\s,.;%()–’'/-]|_", lambda sign: f"&#{ord(sign[0])};", line))


def _grid(table: Table, names: bool = False) -> Markdown:
    """Return a table; with ``names``, those in the first column become code spans."""
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)]]
    lines += [[code(line[0], cell=True) if names else _inert(line[0]), *map(_inert, line[1:])] for line in table.lines]
    drawn = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return Markdown(drawn + (f"\n\n{_inert(table.note)}" if table.note else ""))


def _link(name: str, base: str, cell: bool = False) -> Markdown:
    return Markdown(f"[{code(name)}]({base}{name})") if _REPO.fullmatch(name) else code(name, cell)


def _revision(model: ModelRecord) -> Markdown:
    known = model.revision or model.digest or model.requested_revision
    return Markdown("–") if known is None else code(known if len(known) <= 20 else known[:19] + "…", cell=True)
