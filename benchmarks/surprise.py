"""How a real student finds real texts: Rank-Surprisal Ratio, likeness and words of doubt of sets of the same problems.

    python benchmarks/surprise.py --student SMALL_MODEL gpt-oss=a.jsonl qwen3=b.jsonl replay=c.jsonl

Reads what `tessy analyze` reads, two or three sets, and prints Markdown tables. `replay.py --out` writes such a set.
"""

import argparse
import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from tessy_hf.engines.scoring import Scorer
from tessy_hf.engines.transformers import TransformersEngine
from tessy_hf.report.compare import analyze
from tessy_hf.text.vocabulary import Vocabulary


def table(heads, rows):
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))


def doubts(markers):
    """Return the words of doubt of a set per thousand words, the three most frequent named."""
    counts = Counter()
    for own in markers.values():
        counts.update(own)
    most = ", ".join(f"{word} {rate:.1f}" for word, rate in counts.most_common(3) if rate)
    return f"{counts.total():.1f}" + (f" ({most})" if most else "")


def main():
    """Parse the command line, score, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", nargs="+", help="NAME=FILE, JSON lines")
    parser.add_argument("--student", required=True, help="a folder or a Hub id")
    parser.add_argument("--rows", type=int, default=100, help="how many rows of each set are read")
    parser.add_argument(
        "--tokens", type=int, default=512, help="how many tokens of prompt and text are scored at most"
    )
    args = parser.parse_args()
    sets = {}
    for name, _, path in (given.partition("=") for given in args.sets):
        with open(path, encoding="utf-8") as lines:
            sets[name] = [json.loads(line) for line in islice(lines, args.rows)]
    vocabulary = Vocabulary(AutoTokenizer.from_pretrained(args.student), args.student)
    scorer = Scorer(TransformersEngine(args.student))
    found = analyze(sets, vocabulary, scorer=scorer, nll_rows=args.rows, nll_tokens=args.tokens)
    rows = []
    for name in sets:
        told, lengths = found["surprise"][name], found["tokens"][name]["thinking"]
        by = [f"{kind} {one['nll']:.2f}" for kind, one in found["nll"][name].items() if kind != "all"]
        figures = [f"{told[key]:.2f}" for key in ("rsr", "surprisal", "rank")]
        rows.append([name, *figures, ", ".join(by), f"{lengths['mean']:.0f}", doubts(found["markers"][name])])
    heads = [
        "set",
        "RSR",
        "nats a token",
        "mean rank",
        "nats by author and part",
        "tokens of thinking",
        "words of doubt",
    ]
    print(f"{found['prompts']} problems, {args.student}, at most {args.tokens} tokens each\n")
    print(table(heads, rows), "\n")
    print(table(["sets", "similarity"], [[" and ".join(x["of"]), f"{x['mean']:.3f}"] for x in found["similarity"]]))


if __name__ == "__main__":
    main()
