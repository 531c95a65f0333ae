"""Who am I: this process's place among the ranks, read from the launcher's environment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bigvision.errors import UserError


@dataclass(frozen=True)
class Identity:
    """This process among all that run together."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    launcher: str


def identify(environ: Mapping[str, str]) -> Identity:
    """Read the launcher's environment; without one this process is the only rank.

    Raises:
        UserError: the environment of a launcher is there in part, or its numbers do not fit together.
    """
    for resolve in RESOLVERS:
        if found := resolve(environ):
            return found
    return Identity(rank=0, world_size=1, local_rank=0, local_world_size=1, launcher="python")


def _from_torch_environment(environ: Mapping[str, str]) -> Identity | None:
    """torchrun, accelerate launch and the deepspeed launcher set these variables; a worker needs all of them."""
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    present = [name for name in needed if environ.get(name)]
    # MASTER_* alone are often exported in a shell or an image and start nothing.
    if not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(present):
        return None
    if missing := [name for name in needed if name not in present]:
        raise UserError(
            f"environment: {', '.join(f'{name}={environ[name]}' for name in present)} without {', '.join(missing)}: "
            "start the ranks with torchrun or accelerate launch, which set them all, or unset them to run on one rank"
        )
    rank, world_size, local_rank = (_number(environ, name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    local_name = "LOCAL_WORLD_SIZE" if environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    local_world_size = _number(environ, local_name) if environ.get(local_name) else world_size
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"environment: RANK={rank} must be from 0 to WORLD_SIZE-1 (WORLD_SIZE={world_size})")
    if not 0 <= local_rank < local_world_size:
        raise UserError(
            f"environment: LOCAL_RANK={local_rank} must be from 0 to {local_name}-1 ({local_world_size} ranks here)"
        )
    launcher = next((name for key, name in _LAUNCHERS.items() if environ.get(key)), "torch environment")
    return Identity(rank, world_size, local_rank, local_world_size, launcher)


def _number(environ: Mapping[str, str], name: str) -> int:
    try:
        return int(environ[name])
    except ValueError:
        raise UserError(
            f"environment: {name}={environ[name]!r} is not a whole number: unset it or start with torchrun"
        ) from None


# accelerate starts its ranks through torch's launcher, so its mark is looked for first.
_LAUNCHERS = {"ACCELERATE_MIXED_PRECISION": "accelerate", "TORCHELASTIC_RUN_ID": "torchrun", "LOCAL_SIZE": "deepspeed"}

RESOLVERS: list[Callable[[Mapping[str, str]], Identity | None]] = [_from_torch_environment]
"""Tried in order; each knows one launcher's variables and returns None when they are not there."""
