"""`calibrate`: statistics, quantiles and threshold, and the errors of the dtypes beside them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from efficientad.calibration.measuring import measure_precision
from efficientad.data.decoding import ImageError
from efficientad.model import calibration
from efficientad.model.calibration import FALSE_POSITIVE_RATE, GoodImages, Progress
from efficientad.model.detector import EfficientAD


def calibrate(
    detector: EfficientAD,
    good_images: GoodImages,
    *,
    false_positive_rate: float = FALSE_POSITIVE_RATE,
    statistics: bool | None = None,
    batch_size: int = 8,
    workers: int = 2,
    progress: Progress | None = None,
    on_error: Callable[[int, object, ImageError], None] | None = None,
) -> EfficientAD:
    """Set what a detector needs beside its weights: statistics, quantiles and a threshold.

    Of a detector with a region (`EfficientAD.set_region`) its cells and pixels alone count.

    Then the scores behind the threshold are computed again in the low precisions that the device
    has; `provenance["calibration"]["precision"]` keeps how far they lie from float32's, by which
    `FastPredictor` chooses (docs/precision.md). Beside it are the scores, the exact binomial bound
    on false rejects, and per folder how many images lie above the threshold (`model.trust`).

    Args:
        detector: changed in place and returned; it stays on its device.
        good_images: images without defects: a folder, a data set in a known layout, a list of
            files and folders, or a `DataSet`; see `model.calibration.split_good_images`. Several
            folders are lots (days, batches): each is compared with the others.
        false_positive_rate: share of the images for the quantiles that may exceed the threshold.
        statistics: True computes the teacher's channel statistics anew from the training images,
            False keeps them, None computes them if they are not set. A student is trained against
            particular statistics: name the images it was trained on, or leave them alone.
        batch_size, workers: images per forward pass and decoding threads.
        progress: called with (what, images done, images in all).
        on_error: called with (index, source, error) for an unreadable image, which is left out;
            without it the error is raised.

    A `GoodImageWarning` names images that were trained on, lots that are unlike the others, and
    images that score far above all others.

    Raises:
        ValueError: a rate outside [0, 1), no readable image, statistics neither set nor wanted, or
            maps not finite. After this or any other error the detector is as it was.
    """
    return calibration.calibrate(
        detector,
        good_images,
        false_positive_rate=false_positive_rate,
        statistics=statistics,
        batch_size=batch_size,
        workers=workers,
        progress=progress,
        on_error=on_error,
        measure=partial(measure_precision, progress=progress),
    )
