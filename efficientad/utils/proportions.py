"""Exact statements about a share of which a sample is known."""

from __future__ import annotations

import numpy as np

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


def exceeding_chance(count: int, of: int, beyond: int, others: int) -> float:
    """The chance that `count` or more of `of` cases exceed a limit set from others like them.

    The limit is the one of `others` independent cases that exactly `beyond` of them exceed, so the
    share above it follows a beta distribution and the number above it a beta-binomial one.

    Raises:
        ValueError: others < 1, beyond outside 0..others - 1, of < 1, or count outside 0..of.
    """
    from scipy.special import betaln, gammaln

    of, others = check_integer("of", of, 1), check_integer("others", others, 1)
    for name, value, most in (("count", count, of), ("beyond", beyond, others - 1)):
        if check_integer(name, value, 0) > most:
            raise ValueError(f"{name} is {value}; it must be at most {most}")
    k = np.arange(count, of + 1)
    choices = gammaln(of + 1) - gammaln(k + 1) - gammaln(of - k + 1)
    a, b = beyond + 1, others - beyond
    return min(1.0, float(np.exp(choices + betaln(k + a, of - k + b) - betaln(a, b)).sum()))
