"""Exact statements about a share of which a sample is known."""

from __future__ import annotations

from efficientad.utils.checks import check_integer, check_number

CONFIDENCE = 0.95


def upper_bound(count: int, of: int, confidence: float = CONFIDENCE) -> float:
    """The largest share that `count` of `of` independent cases still allow (Clopper-Pearson).

    One-sided: with probability `confidence` the true share lies below. Where the limit that
    `count` cases exceed is one of the sample's own order statistics, the bound is the exact one of
    that statistic's tolerance interval.

    Raises:
        ValueError: of < 1, count outside 0..of, or confidence outside (0, 1).
    """
    from scipy.special import betaincinv

    of = check_integer("of", of, 1)
    count = check_integer("count", count, 0)
    if count > of:
        raise ValueError(f"count is {count}; it must be at most of, which is {of}")
    confidence = check_number("confidence", confidence, 0, 1, above=True)
    return 1.0 if count == of else float(betaincinv(count + 1, of - count, confidence))
