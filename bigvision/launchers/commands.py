"""A command's recipe and the options beside it. Nothing heavy is imported: `bigvision submit` does without torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bigvision.errors import UserError

SUBJECT = ("--model.name", "--data.train", "--data.val")
"""The flags that say what is trained: a run that has one of them is not that of the digits."""


def take_recipe(arguments: Sequence[str]) -> tuple[str | None, list[str], str | None]:
    """The recipe of a command, its flags, and a line that reports what is taken where no recipe is named.

    Without arguments, or with flags that leave open what is trained, that is the recipe of the digits. A flag that names a
    model or data makes it another run: it starts from the defaults of every key, not from values that were chosen for digits.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:]), None
    if named := [flag for argument in arguments if (flag := argument.partition("=")[0]) in SUBJECT]:
        note = f"recipe: none, since {named[0]} is given: the default of each key, the model's image size"
        return None, list(arguments), note
    recipe = default_recipe()
    return str(recipe), list(arguments), f"recipe: {recipe}"


def default_recipe() -> Path:
    """The recipe that trains when none is named."""
    package = Path(__file__).parents[1]
    beside_source = package.parent / "recipes" / "digits.yaml"
    return beside_source if beside_source.exists() else package / "recipes" / "digits.yaml"


def take(arguments: Sequence[str], names: Sequence[str]) -> tuple[list[tuple[str, str]], list[str]]:
    """Take ``--name value`` and ``--name=value`` of *names* out of *arguments*; returns each (name, value), and the others."""
    given: list[tuple[str, str]] = []
    rest: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name not in names:
            rest.append(argument)
            continue
        value = value if equals else next(waiting, "")
        if not value:
            raise UserError(f"{name}: a value is missing: write {name} VALUE")
        given.append((name, value))
    return given, rest


def whole(name: str, text: str, lowest: int = 1) -> int:
    """*text* as a whole number from *lowest* on."""
    # Not str.isdigit: int() takes the digits of every script, and a job's script would keep them.
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < lowest:
        raise UserError(f"{name}: {text!r} must be a whole number from {lowest} on")
    return int(text)
