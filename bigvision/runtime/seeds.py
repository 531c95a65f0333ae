"""Seeds as functions of (seed, what for, position), so that randomness needs no saved state."""

from __future__ import annotations

import hashlib
import struct


def derive_seed(seed: int, purpose: str, *position: int) -> int:
    """A 63-bit seed that is as good as independent for every different argument."""
    packed = struct.pack(f"<{1 + len(position)}q", seed, *position)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8, person=purpose.encode()).digest(), "little") >> 1
