"""A command's own flags beside those of a recipe."""

from __future__ import annotations

from collections.abc import Sequence

from bigvision.errors import UserError


def take(arguments: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Take ``--name value`` and ``--name=value`` of *names* out of *arguments*; returns their values, and the others.

    Raises:
        UserError: a value is missing.
    """
    given: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
            continue
        given[name] = value if equals else next(waiting, "")
        if not given[name]:
            raise UserError(f"{name}: a value is missing: write {name} VALUE")
    return given, rest


def whole(name: str, text: str, lowest: int = 1) -> int:
    """*text* as a whole number from *lowest* on.

    Raises:
        UserError: it is none.
    """
    # Not str.isdigit: int() takes the digits of every script, and a job's script would keep them.
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < lowest:
        raise UserError(f"{name}: {text!r} must be a whole number from {lowest} on")
    return int(text)
