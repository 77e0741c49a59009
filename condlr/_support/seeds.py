"""Where every random number of a run comes from."""

import hashlib


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed for one purpose of a run: independent of the others, and the same on every machine."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
