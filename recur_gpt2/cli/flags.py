"""Flags from the fields of a dataclass, so that a default and what it means stand in one place."""

from __future__ import annotations

import ast
import inspect
import re
import types
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Collection
from dataclasses import MISSING, fields
from itertools import pairwise
from textwrap import dedent
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def add_flags(
    parser: ArgumentParser, settings: type, *, leave_out: Collection[str] = (), unset: Collection[str] = (), **defaults
) -> None:
    """Add a flag for each field: `save_every: int` is --save-every, a bool is a switch, a Literal a choice.

    Args:
        settings: a dataclass whose fields have docstrings; "...; None: X." says what None stands for.
        leave_out: fields that are no flags.
        unset: fields whose flag is None where it was not given, so that one can tell.
        defaults: of the command, where they are not the class's.
    """
    hints, docs = get_type_hints(settings), _docstrings(settings)
    for field in fields(settings):
        if field.name in leave_out:
            continue
        flag, kind, many = f"--{field.name.replace('_', '-')}", *_kind(hints[field.name])
        default = defaults.get(field.name, None if field.default is MISSING else field.default)
        help = _help(docs[field.name], default)
        if kind is bool:
            parser.add_argument(flag, action="store_true", help=help)
            continue
        options: dict[str, Any] = {"nargs": "+"} if many else {}
        options |= {"choices": get_args(kind)} if get_origin(kind) is Literal else {"type": kind}
        needed = field.default is MISSING and field.default_factory is MISSING and field.name not in defaults
        default = None if field.name in unset else default
        parser.add_argument(flag, default=default, help=help, required=needed, **options)


def settings_of(settings: type, args, **others):
    """An instance with what the flags say, and others."""
    names = {field.name for field in fields(settings)}
    given = {name: value for name, value in vars(args).items() if name in names and name not in others}
    return settings(**given, **others)


def _kind(hint) -> tuple[Any, bool]:
    """int | None -> int, False; list[str] | None -> str, True."""
    if get_origin(hint) in (types.UnionType, Union):
        (hint,) = (each for each in get_args(hint) if each is not type(None))
    return (get_args(hint)[0], True) if get_origin(hint) is list else (hint, False)


def _docstrings(settings) -> dict[str, str]:
    """{field: the string below it}"""
    body = ast.parse(dedent(inspect.getsource(settings))).body[0].body
    return {
        field.target.id: " ".join(ast.literal_eval(text.value).split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def _help(doc, default):
    doc, none, meaning = doc.rstrip(".").partition("; None: ")
    if none:
        doc = f"{doc} (default: {meaning})"
    elif default is not None and default is not False:
        doc = f"{doc} (default: {default:g})" if isinstance(default, float) else f"{doc} (default: {_short(default)})"
    doc = doc[0].lower() + doc[1:] if doc[1].islower() else doc
    return doc.replace("%", "%%")


def _short(default):
    """Bundled models by the name that they have in a clone."""
    return re.sub(r"^.*/(data|bundled)/", "data/", str(default))


def lanes(text: str) -> int | None:
    """What --lanes says where "auto" is as many as fit: None."""
    if text == "auto":
        return None
    if not text.isdigit() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r} is no number of lanes; give auto, or 1 or more")
    return int(text)
