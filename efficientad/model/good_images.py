"""Good images that say nothing, or that are unlike all others: refused, or left out and named.

One black frame among a few good ones would set a scale on which every part is an anomaly. So images
of one colour never count; where they are more than a few, nothing is calibrated.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from efficientad.data.images import Batch
from efficientad.model.known_pictures import picture_digest
from efficientad.utils.files import listed, plain_text

FLAT_LEVELS = 2  # of 255: an image with no larger range in any channel shows nothing
MOST_FLAT = 0.1  # share of the good images
_LISTED = 5  # names in a message
# Of a normal distribution's deviation; good images' scores have longer tails than that.
_ODD_DEVIATIONS = 10.0
_FEWEST_FOR_ODD = 8


class GoodImageWarning(UserWarning):
    """Some good images were left out, or look as if they were not good."""


class GoodImagesSeen:
    """Counts good images as they are read and finds those of one colour.

    Args:
        what: the images are for, as in "the threshold".

    Attributes:
        count, flat: images seen, and the names of those of one colour.
        digests: (digest, source) of the pixels of each, see `known_pictures`.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self.count = 0
        self.flat: list[str] = []
        self.digests: list[tuple[str, object]] = []

    def add(self, batch: Batch) -> Tensor:
        """Which images of a batch show something, as a mask (N,)."""
        pixels = batch.images.flatten(2)
        spread = (pixels.amax(2) - pixels.amin(2)).amax(1) * 255
        shows = spread > FLAT_LEVELS + 0.5  # rounding of the division by 255
        levels = (batch.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        for image, source, good in zip(levels, batch.sources, shows.tolist(), strict=True):
            self._count(image, source, good)
        return shows

    def add_pixels(self, image: np.ndarray, source: object) -> None:
        """One image (H, W, C), uint8."""
        self._count(image, source, bool(np.ptp(image, axis=(0, 1)).max() > FLAT_LEVELS))

    def _count(self, image: np.ndarray, source: object, good: bool) -> None:
        self.digests.append((picture_digest(image), source))
        self.count += 1
        if not good:
            self.flat.append(plain_text(source))

    def check(self, done: str, *, alike: bool = True) -> None:
        """Warn of images of one colour.

        Args:
            done: what becomes of them, as in "they are left out".
            alike: whether the same pixels in all images are an error, too.

        Raises:
            ValueError: too many of them, or one image again and again.
        """
        share = len(self.flat) / max(self.count, 1)
        of_all = f"{len(self.flat)} of {self.count} good images for {self._what} ({share:.0%})"
        if share > MOST_FLAT:
            raise ValueError(
                f"{of_all} are of one colour and say nothing about good parts "
                f"({listed(self.flat, _LISTED)}); leave them out, at most {MOST_FLAT:.0%} may be "
                "like that"
            )
        if alike and self.count > 1 and len({digest for digest, _ in self.digests}) == 1:
            raise ValueError(
                f"all {self.count} good images for {self._what} have the same pixels; how good "
                "parts differ does not follow from one picture: give different ones"
            )
        if self.flat:
            warnings.warn(
                f"{of_all} are of one colour, and {done}: {listed(self.flat, _LISTED)}",
                GoodImageWarning,
                stacklevel=2,
            )


def odd_images(sources: Sequence[object], scores: Sequence[float]) -> list[str]:
    """Names of good images whose scores lie far above all others'; none of fewer than eight."""
    values = np.asarray(scores, np.float64)
    if len(values) < _FEWEST_FOR_ODD:
        return []
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75))
    far = values > middle + _ODD_DEVIATIONS * max((high - low) / 1.349, 1e-6 * abs(middle))
    return [plain_text(source) for source, odd in zip(sources, far.tolist(), strict=True) if odd]


def warn_of_odd(sources: Sequence[object], scores: Sequence[float]) -> list[str]:
    """`odd_images`, with a warning that names them."""
    odd = odd_images(sources, scores)
    if odd:
        warnings.warn(
            f"{len(odd)} of {len(scores)} good images score far above the others, whose median is "
            f"{np.median(np.asarray(scores)):.3g} ({listed(odd, _LISTED)}; the highest score is "
            f"{max(scores):.3g}): if that is no good part, leave it out and calibrate again, the "
            "threshold rests on it",
            GoodImageWarning,
            stacklevel=3,
        )
    return odd
