"""Render the HTML pages of reports: a template and its fields go in, one self-contained page comes out.

Pages fetch nothing and run no script but our own: a Content-Security-Policy in the page says so. Fields are escaped.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from typing import Any

from tessy_hf.report.figures import COLORS


def render(template: str, script: str | None = None, **fields: Any) -> str:
    """Render a template of this folder.

    Args:
        template: The file's name.
        script: The file of the page's script, if it has one.
        **fields: What the template shows.
    """
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    code = _read(script) if script else ""
    ours = {"script": code, "style": _read("viewer.css"), "policy": _policy(code)}
    environment = Environment(
        loader=FunctionLoader(_read), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    return environment.get_template(template).render(
        **{name: Markup(text) for name, text in ours.items()},  # noqa: S704 - our own files
        **fields,
    )


def drawn(image: bytes, description: str, *, wide: bool = False) -> dict[str, Any]:
    """Return a light SVG figure for a page; it takes the page's font, and its colors, light or dark."""
    from markupsafe import Markup

    svg = image.decode()
    svg = svg[svg.index("<svg") :]
    variables = {
        COLORS.text: "text", COLORS.muted: "muted", COLORS.line: "line", COLORS.teacher: "teacher",
        COLORS.student: "student-fill", **{color: f"dataset-{at}" for at, color in enumerate(COLORS.datasets)},
    }  # fmt: skip
    for color, variable in variables.items():
        svg = svg.replace(color, f"var(--{variable})")
    safe = Markup(svg.replace("'DejaVu Sans'", "inherit"))  # noqa: S704 - matplotlib escapes the text in it
    return {"svg": safe, "description": description, "wide": wide}


def _read(name: str) -> str:
    return (resources.files(__package__) / name).read_text("utf-8")


def _policy(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    scripts = f"script-src 'sha256-{digest}'; " if script else ""
    return (
        f"default-src 'none'; {scripts}style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
    )
