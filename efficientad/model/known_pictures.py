"""Which pictures a detector was trained on, kept small enough for its file.

A picture is known by a digest of its pixels at the network's resolution, so that a copy under
another name is recognised, and one that was cut or changed is not.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

MOST_DIGESTS = 2048
_BYTES = 6  # among a thousand pictures none of 2,048 is met by chance in 1 of 100 million cases


def picture_digest(pixels: np.ndarray) -> str:
    """Of uint8 pixels (H, W, 3), twelve hexadecimal digits."""
    return hashlib.blake2b(pixels.tobytes(), digest_size=_BYTES).hexdigest()


def known_pictures(digests: Iterable[str]) -> dict[str, Any]:
    """The record of a set of pictures: how many, and their digests; the lowest of too many."""
    different = sorted(set(digests))
    return {"pictures": len(different), "digests": different[:MOST_DIGESTS]}


def among_known(record: object, digests: Iterable[str]) -> set[str]:
    """Those digests that a record of `known_pictures` holds; none of anything else.

    A record of more than `MOST_DIGESTS` pictures holds so many of them, by chance.
    """
    if not isinstance(record, Mapping) or not isinstance(record.get("digests"), list):
        return set()
    return set(digests) & {digest for digest in record["digests"] if isinstance(digest, str)}
