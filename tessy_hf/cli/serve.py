"""`tessy serve`: teacher and student as one model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from tessy_hf.cli.synthesize import open_transform


def serve(
    recipe: Annotated[str, typer.Argument(help="A YAML recipe, or a release: user/name@v1.0.0.", show_default=False)],
    host: Annotated[str, typer.Option(help="Address to listen on; anyone who reaches it may ask.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name for clients; by default the recipe's.")] = None,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait; further ones get 429.")] = 256,
    change: Annotated[list[str] | None, typer.Option("--set", help="Change the recipe: temperature=0.5.")] = None,
    run: Annotated[str | None, typer.Option(help="Which run of a release, if it has several.")] = None,
) -> None:
    """Serve teacher and student as one model, with the OpenAI protocol, until Ctrl-C or SIGTERM.

    Nothing is kept: the recipe's journal, parts and verifier are not used.
    """
    from tessy_hf.serve.server import serve as run_server

    called = name or (Path(recipe).stem if Path(recipe).exists() else recipe.rpartition("/")[2])

    def ready(url: str) -> None:
        Console(stderr=True).print(f"{called} is served at {url}", highlight=False, soft_wrap=True)

    transform = open_transform(recipe, change or [], run)
    run_server(transform, ready, name=called, host=host, port=port, max_waiting=max_waiting)
