"""Show the cross-reference roles of docstrings, such as ``:class:`Speaker```, as code on the site's API pages."""

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?([^`]+)`")


class Roles(griffe.Extension):
    """Replaces roles in every docstring that is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring:
            obj.docstring.value = plain(obj.docstring.value)


def plain(text: str) -> str:
    """Return text with roles as code: the last part of the name."""
    return _ROLE.sub(lambda found: f"`{found[1].rpartition('.')[2] if '/' not in found[1] else found[1]}`", text)
