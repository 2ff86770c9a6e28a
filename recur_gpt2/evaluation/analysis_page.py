"""The page of an analysis: one HTML file, with the data in it, that needs no network."""

from __future__ import annotations

import html
import json
from importlib.resources import files
from string import Template


def analysis_page(analysis: dict, title: str) -> str:
    """analysis: what `analyze` gave. All text goes in as data, and is shown as text."""
    data = json.dumps(_rounded(analysis), ensure_ascii=False, separators=(",", ":"))
    # Inside a script element only "<" can end it.
    template = Template(files(__package__).joinpath("analysis.html").read_text(encoding="utf-8"))
    return template.substitute(title=html.escape(title), data=data.replace("<", "\\u003c"))


def _rounded(value):
    """The same with four digits behind the point: what is shown has fewer."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list) else value
