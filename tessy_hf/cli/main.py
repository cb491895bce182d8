"""The `tessy` command. Each command is a thin function: arguments in, one call, words for people out."""

from __future__ import annotations

import typer
from rich.console import Console

from tessy_hf.cli import boundary, release, report, rows, synthesize
from tessy_hf.errors import TessyError

app = typer.Typer(
    help="Cooperative teacher-student synthesis of reasoning data (TESSY).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (
    synthesize.synthesize,
    synthesize.plan,
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
    """Run the command. A user's mistake ends in one sentence, not in a traceback."""
    try:
        app()
    except TessyError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]", end=": ")
        Console(stderr=True).print(str(error), markup=False, soft_wrap=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
