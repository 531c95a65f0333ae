"""A command's recipe, and its own flags beside those of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bigvision.errors import UserError

SUBJECT = ("--model.name", "--data.train", "--data.val")
"""The flags that say what is trained: a run that has one of them is not that of the digits."""


def take_recipe(arguments: Sequence[str]) -> tuple[str | None, list[str], str | None]:
    """The recipe of a command, its flags, and a line that says what is taken where no recipe is named.

    Without arguments, or with flags that leave open what is trained, that is the recipe of the digits. A flag that names a
    model or data makes it another run: it starts from the defaults of every key, not from values that were chosen for digits.
    """
    if arguments and not arguments[0].startswith("-"):
        return arguments[0], list(arguments[1:]), None
    if named := [flag for argument in arguments if (flag := argument.partition("=")[0]) in SUBJECT]:
        return (
            None,
            list(arguments),
            f"recipe: none, since {named[0]} is given: the default of each key, the model's image size",
        )
    recipe = default_recipe()
    return str(recipe), list(arguments), f"recipe: {recipe}"


def default_recipe() -> Path:
    """The recipe that trains when none is named."""
    package = Path(__file__).parents[1]
    beside_source = package.parent / "recipes" / "digits.yaml"
    return beside_source if beside_source.exists() else package / "recipes" / "digits.yaml"


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


def take_all(arguments: Sequence[str], name: str) -> tuple[list[str], list[str]]:
    """Take each ``--name value`` and ``--name=value`` out of *arguments*; returns the values in order, and the others.

    Raises:
        UserError: a value is missing.
    """
    values: list[str] = []
    rest = list(arguments)
    while at := next((n for n, argument in enumerate(rest, start=1) if argument.partition("=")[0] == name), 0):
        end = at if "=" in rest[at - 1] else at + 1
        given, rest[at - 1 : end] = take(rest[at - 1 : end], (name,))
        values.append(given[name])
    return values, rest


def whole(name: str, text: str, lowest: int = 1) -> int:
    """*text* as a whole number from *lowest* on.

    Raises:
        UserError: it is none.
    """
    # Not str.isdigit: int() takes the digits of every script, and a job's script would keep them.
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < lowest:
        raise UserError(f"{name}: {text!r} must be a whole number from {lowest} on")
    return int(text)
