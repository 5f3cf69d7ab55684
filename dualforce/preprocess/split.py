"""Train and validation by identity: who is in one is not in the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable


def split_identities(identities: Iterable[str], validation_share: float) -> dict[str, str]:
    """ "train" or "validation" for every identity.

    About `validation_share` of the identities, those with the smallest SHA-256 of their name, are held out: a choice
    that depends on nothing else. With two or more identities each split has at least one; a single one is trained on.
    """
    ranked = sorted(set(identities), key=lambda name: (_digest(name), name))
    held_out = min(max(1, round(validation_share * len(ranked))), len(ranked) - 1) if len(ranked) > 1 else 0
    return {name: "validation" if rank < held_out else "train" for rank, name in enumerate(ranked)}


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()  # JSON may hold halves of characters
