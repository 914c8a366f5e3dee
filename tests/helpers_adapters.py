"""What the adapters' tests share: their bound, and how far two results are apart."""

from __future__ import annotations

TOLERANCE = 1e-5


def largest_difference(found, expected) -> float:
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        found, expected = found.values(), expected.values()
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            scale = max(1.0, float(b.detach().abs().max()))
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst
