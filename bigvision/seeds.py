"""Seeds as functions of what they are for and of the position, so that randomness needs no saved state."""

from __future__ import annotations

import hashlib


def seed_from(*parts: int | str) -> int:
    """Return a seed in 0..2**64-1 that is a hash of *parts*, the same in every process and on every machine."""
    # Sums or shifts of small integers collide and give Mersenne Twister correlated neighbours; a hash does neither.
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")
