"""The `tessy` command. Each command is a thin function: arguments in, one call, words for people out.

Exit codes: 0, all is well; 1, more rows failed than allowed, or rows to merge are missing or differ; 2, it could not
start or go on, as one sentence says; 130, stopped by Ctrl-C.
"""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.console import Console

import tessy_hf
from tessy_hf.cli import boundary, examples, release, report, rows, serve, synthesize, view
from tessy_hf.errors import MergeError, OutputError, TessyError

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
for command in (
    examples.examples,
    synthesize.synthesize,
    synthesize.plan,
    view.view,
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


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"tessy-hf {tessy_hf.__version__}")
        raise typer.Exit()


@app.callback()
def tessy(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Cooperative teacher-student synthesis of reasoning data (TESSY)."""


def main() -> None:
    """Run the command. What this package raises on purpose ends in one sentence, not in a traceback."""
    try:
        app()
    except Exception as error:
        known = _known(error)
        if known is None:
            raise
        from tessy_hf.report.show import visible

        console = Console(stderr=True)
        console.print(f"[bold red]{type(known).__name__}[/]", end=": ")
        text = visible(for_command_line(" ".join(str(known).split())))
        console.print(text, markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1 if isinstance(known, MergeError) else 2) from None


_ADVICE = (
    (r"\b(teacher|student)=Speaker\(engine, (\w+)=\.\.\.\)", r"--set \1.\2=..."),
    (r"\bSpeaker\((?:engine|\.\.\.), (\w+)=([^()]*)\)", r"--set AUTHOR.\1=\2"),
    (r"\bBoundaryPredictor\(\.\.\., (\w+)=(\w*)\)", r"--set AUTHOR.boundary.\1=\2"),
    (r"\b\w+Engine\(\.\.\., (\w+)=(\w*)\)", r"--set AUTHOR.options.\1=\2"),
    (r"\b([Pp]ass|or|with|instance) (?=(?:SETTINGS)=)", r"\1 --set "),
    (r"(--set [\w.]+=)None\b", r"\1null"),
)


def for_command_line(text: str) -> str:
    """Return an error's text with ``--set NAME=VALUE`` where it advises keyword arguments of Python."""
    from tessy_hf.settings import Settings

    for pattern, words in _ADVICE:
        text = re.sub(pattern.replace("SETTINGS", "|".join(Settings.model_fields)), words, text)
    return text


_PATHS = (PermissionError, FileExistsError, IsADirectoryError, NotADirectoryError)


def _known(error: BaseException | None) -> TessyError | None:
    """Return the error of ours that an error comes from: `datasets` and others wrap what a function raises.

    A path that cannot be used is the user's to change, whichever command was to read or write it.
    """
    if isinstance(error, _PATHS) and error.filename is not None:
        return OutputError(f"{error.filename} cannot be used: {error.strerror}. Pass another path, or fix this one.")
    while error is not None and not isinstance(error, TessyError):
        error = error.__cause__
    return error


if __name__ == "__main__":
    main()
