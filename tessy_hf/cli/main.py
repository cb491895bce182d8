"""The `tessy` command. Each command is a thin function: arguments in, one call, words for people out.

Exit codes: 0, all is well; 1, more rows failed than allowed, or rows to merge are missing or differ; 2, it could not
start or go on, as one sentence says; 130, stopped by Ctrl-C.
"""

from __future__ import annotations

import typer
from rich.console import Console

from tessy_hf.cli import boundary, release, report, rows, serve, synthesize
from tessy_hf.errors import MergeError, TessyError

app = typer.Typer(
    help="Cooperative teacher-student synthesis of reasoning data (TESSY).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    synthesize.synthesize,
    synthesize.plan,
    serve.serve,
    rows.status,
    rows.export,
    rows.merge,
    release.push,
    release.show,
    release.diff,
    report.report,
    report.analyze,
    boundary.annotate,
    boundary.train_boundary,
    boundary.push_boundary,
    boundary.evaluate_boundary,
):
    app.command(command.__name__.replace("_", "-"))(command)


def main() -> None:
    """Run the command. What this package raises on purpose ends in one sentence, not in a traceback."""
    try:
        app()
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        console = Console(stderr=True)
        console.print(f"[bold red]{type(known).__name__}[/]", end=": ")
        console.print(" ".join(str(known).split()), markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1 if isinstance(known, MergeError) else 2) from None


def _known(error: BaseException | None) -> TessyError | None:
    """Return the error of ours that an error comes from: `datasets` and others wrap what a function raises."""
    while error is not None and not isinstance(error, TessyError):
        error = error.__cause__
    return error


if __name__ == "__main__":
    main()
