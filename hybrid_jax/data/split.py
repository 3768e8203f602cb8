"""Which documents are held out: decided by a hash of the name, so that it never changes."""

import hashlib


def is_heldout(name: str, fraction: float) -> bool:
    """Whether the document called `name` (a relative path with '/') is kept for evaluation.

    Depends on the name alone: adding or removing other documents moves nothing.
    """
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
