"""What a detector needs beside its weights.

Source: arXiv 2303.14535, Algorithm 1 (channel statistics at its start, map quantiles at its end).
Memory does not grow with the number of images: features are reduced image by image, raw maps go to
a temporary file, and the quantiles are exact order statistics found in two passes over that file.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad.data.datasets import DataSet, Sample, split_validation
from efficientad.data.decoding import ImageError
from efficientad.data.image_files import find_images
from efficientad.data.images import Batch, load_batches
from efficientad.data.layouts import open_dataset
from efficientad.model.detector import QUANTILE_LEVELS, EfficientAD, check_detector
from efficientad.model.global_term import line_of, student_means
from efficientad.model.good_images import GoodImagesSeen, warn_of_odd
from efficientad.model.map_rule import check_weight
from efficientad.model.networks import TEACHER_CHANNELS
from efficientad.model.precision import Precision
from efficientad.model.region import facts, index_of, map_means, of_cells
from efficientad.model.trust import judge_lots, named_lots, trust, warn_of_own
from efficientad.utils.checks import check_number
from efficientad.utils.devices import full_float32
from efficientad.utils.processes import computing
from efficientad.utils.quantiles import streaming_quantiles

GoodImages = str | os.PathLike | DataSet | Iterable[str | os.PathLike]  # without defects
Progress = Callable[[str, int, int], None]  # (what is done, images so far, images in all)
Measure = Callable[[EfficientAD, Sequence[Path], Sequence[float]], Precision]
FALSE_POSITIVE_RATE = 0.01
# Of q_b - q_a as part of q_b. Trained detectors have a tenth and more; what is left of constant
# maps is the rounding of distances, below a ten-thousandth.
LEAST_SPREAD = 1e-3
_CHUNK = 32  # maps read back from the temporary file at a time


class ChannelStatistics:
    """Mean and population standard deviation per channel over all images and positions.

    Each image is reduced in two passes and merged in float64 (Chan et al.), so the result does not
    depend on the order of the images beyond float64 rounding.
    """

    def __init__(self, channels: int = TEACHER_CHANNELS) -> None:
        self.count = 0
        self._mean = torch.zeros(channels, dtype=torch.float64)
        self._squares = torch.zeros(channels, dtype=torch.float64)  # sum of squared deviations

    def add(self, features: Tensor) -> None:
        """Add features (N, C, h, w)."""
        for image in features.flatten(2):
            x = image.double()
            mean = x.mean(dim=1)
            squares = (x - mean[:, None]).square().sum(dim=1)
            n = x.shape[1]
            total = self.count + n
            delta = mean.cpu() - self._mean
            self._mean += delta * (n / total)
            self._squares += squares.cpu() + delta.square() * (self.count * n / total)
            self.count = total

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation, each (C,) float64; ValueError when nothing was added."""
        if self.count == 0:
            raise ValueError("channel statistics need at least one image")
        return self._mean, (self._squares / self.count).sqrt()

    def of_teacher(self) -> tuple[Tensor, Tensor]:
        """`result` of a teacher on good images; what lies below float32's rounding becomes 0.

        Raises:
            ValueError: more than half of the channels are constant, or nothing was added.
        """
        mean, std = self.result()
        rounding = 1e-5 * (mean.square() + std.square()).mean().sqrt()
        constant = std <= rounding
        if int(constant.sum()) > len(std) // 2:
            raise ValueError(
                f"{int(constant.sum())} of {len(std)} teacher channels are constant on the good "
                "images, which show nothing then: give images of the parts"
            )
        return mean, std.masked_fill(constant, 0.0)


class MapFile:
    """Raw distance maps (2, h, w) of many images in a temporary file that vanishes when closed."""

    def __init__(self, height: int, width: int) -> None:
        self.shape = (2, height, width)
        self.count = 0
        self._file = tempfile.TemporaryFile(prefix="efficientad-maps-")

    def add(self, map_st: Tensor, map_ae: Tensor) -> None:
        """Append maps (N, h, w) of N images."""
        both = torch.stack([map_st, map_ae], dim=1).float().cpu().numpy()
        self._file.write(both.tobytes())
        self.count += len(both)

    def chunks(self) -> Iterator[Tensor]:
        """(n, 2, h, w) float32, from the first image to the last; may be called again."""
        self._file.flush()
        self._file.seek(0)
        size = 4 * math.prod(self.shape)
        while data := self._file.read(_CHUNK * size):
            yield torch.frombuffer(bytearray(data), dtype=torch.float32).view(-1, *self.shape)

    def close(self) -> None:
        self._file.close()


def quantile_values(detector: EfficientAD, maps: Tensor) -> Tensor:
    """The values of raw maps (N, h, w) that count for the quantiles under the detector's rule.

    "nelson": the raw cells. "anomalib": the pixels of the zero-padded, resized map. "paper": those
    of the resized map, which has no padding. With a region those in it, (N, k).
    """
    values, counted = maps, detector.region_cells
    if detector.border != "nelson":
        padded = F.pad(maps[:, None], (detector.map_padding,) * 4)
        values = F.interpolate(padded, size=detector.image_size, mode="bilinear")[:, 0]
        counted = detector.region
    return values if counted is None else values[:, counted.to(values.device)]


def threshold_from_scores(scores: Sequence[float], false_positive_rate: float) -> float:
    """The lowest score that at most `false_positive_rate` of the given normal scores exceed.

    With fewer than 1 / false_positive_rate scores it is the highest of them.

    Raises:
        ValueError: no scores, a score that is not finite, or a rate outside [0, 1).
    """
    check_number("false_positive_rate", false_positive_rate, 0, 1)
    ordered = np.sort(np.asarray(scores, dtype=np.float64))
    if ordered.size == 0:
        raise ValueError("a threshold needs at least one score of a normal image")
    if not np.isfinite(ordered).all():
        raise ValueError("a score of a normal image is not finite; no threshold follows from it")
    may_exceed = math.floor(false_positive_rate * ordered.size + 1e-9)
    return float(ordered[ordered.size - 1 - may_exceed])


def split_good_images(good_images: GoodImages, statistics: bool) -> tuple[list[Path], list[Path]]:
    """(images for the statistics, images for quantiles and threshold) of what a user names.

    A data set in a known layout brings its own split. Of loose images and plain folders one tenth
    is held out (see `data.datasets.split_validation`); if no statistics are wanted, all of
    them serve the quantiles.
    """
    if isinstance(good_images, (str, os.PathLike)) and Path(good_images).is_dir():
        good_images = open_dataset(good_images)
    if isinstance(good_images, DataSet):
        parts = good_images.train, good_images.validation
        loose = good_images.layout == "folder"
    else:
        parts = split_validation(Sample(p) for p in find_images(good_images))
        loose = True
    train, validation = ([sample.path for sample in part] for part in parts)
    return (train, validation) if statistics or not loose else ([], sorted({*train, *validation}))


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
    measure: Measure | None = None,
) -> EfficientAD:
    """As `calibration.calibrating.calibrate`, which see, with what `measure` finds.

    measure: called with the calibrated detector, the images behind the threshold that could be
        read, and their scores; its result is kept in the provenance. None: no dtype is earned.
    """
    check_detector(detector)
    false_positive_rate = check_number("false_positive_rate", false_positive_rate, 0, 1)
    if statistics is None:
        statistics = not detector.has_statistics
    if not statistics and not detector.has_statistics:
        raise ValueError("statistics is False, but the detector has none; leave it at None")
    if not isinstance(good_images, (str, os.PathLike, DataSet)):
        good_images = list(good_images)
    lots = named_lots(good_images)
    train, validation = split_good_images(good_images, statistics)

    def rule(scores: Sequence[float]) -> float:
        return threshold_from_scores(scores, false_positive_rate)

    def batches(paths: list[Path], what: str) -> Iterator[Batch]:
        done = 0
        for batch in load_batches(
            paths,
            detector.image_size,
            batch_size=batch_size,
            workers=workers,
            on_error=on_error,
            value_range=detector.value_range,
        ):
            yield batch
            done += len(batch.indices)
            if progress is not None:
                progress(what, done, len(paths))
        if done == 0:
            raise ValueError(f"none of the {len(paths)} images for the {what} could be read")

    device = detector.teacher_mean.device
    computing()
    was_training = detector.training
    detector.eval()
    maps = MapFile(*detector.feature_size())
    try:
        with torch.no_grad(), full_float32(), _restored_on_error(detector):
            if statistics:
                set_statistics_from(detector, batches(train, "channel statistics"))
            if detector.global_term is not None:
                detector.global_term.set_line(0, 0)  # until the scores without it are known
            held_out = GoodImagesSeen("quantiles and threshold")
            source_sizes: list[tuple[int, int]] = []
            images: list[Path] = []
            distances: list[float] = []
            for batch in batches(validation, "map quantiles"):
                if not (shows := held_out.add(batch)).any():
                    continue
                shown = batch.images[shows].to(device)
                maps.add(*detector.distance_maps(shown))
                distances += global_distances(detector, shown)
                places = shows.nonzero().flatten().tolist()
                source_sizes += [batch.source_sizes[i] for i in places]
                images += [batch.sources[i] for i in places]
            held_out.check("they are left out")
            own = warn_of_own(detector.provenance, held_out)
            scores, means = set_scale(detector, maps, source_sizes, distances)
            odd = warn_of_odd(images, scores)
            detector.threshold = rule(scores)
            by_lot = judge_lots(lots, images, scores, detector.threshold, rule)
            precision = None if measure is None else measure(detector, images, scores).facts()
    finally:
        maps.close()
        detector.train(was_training)
    detector.provenance["calibration"] = {
        "images_for_statistics": len(train) if statistics else 0,
        "images_for_quantiles": maps.count,
        "false_positive_rate": false_positive_rate,
        "threshold_rests_on": len(scores),
        "validation_score_min_mean_max": [min(scores), float(np.mean(scores)), max(scores)],
        "of_one_colour": held_out.flat,
        "odd": odd,
        "precision": precision,
        "trained_on": own,
        "lots": by_lot,
        **(trust(scores, means, detector.threshold) | facts(detector.region)),
    }
    return detector


def set_statistics_from(detector: EfficientAD, batches: Iterable[Batch]) -> None:
    """Set the teacher's channel statistics from the images that show something."""
    collected, seen = ChannelStatistics(), GoodImagesSeen("the channel statistics")
    for batch in batches:
        if (shows := seen.add(batch)).any():
            image = batch.images[shows].to(detector.teacher_mean.device)
            x = detector.teacher(detector.normalize(image))
            collected.add(of_cells(x, index_of(detector.region_cells)))
    seen.check("they are left out", alike=False)
    detector.set_statistics(*collected.of_teacher())


def global_distances(detector: EfficientAD, image: Tensor) -> list[float]:
    """The global term's distances of images (N, 3, H, W); none where there is no term."""
    term = detector.global_term
    if term is None:
        return []
    return term.distance(student_means(detector.student(detector.normalize(image)))).tolist()


@contextmanager
def _restored_on_error(detector: EfficientAD) -> Iterator[None]:
    """Statistics, quantiles and threshold as they were, if anything is raised inside."""
    tensors = [detector.teacher_mean, detector.teacher_std, detector.quantiles, detector.affine]
    names = ("_has_statistics", "_calibrated", "threshold")
    if detector.global_term is not None:
        tensors.append(detector.global_term.line)
    kept = [tensor.clone() for tensor in tensors]
    values = [getattr(detector, name) for name in names]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, before in zip(tensors, kept, strict=True):
                tensor.copy_(before)
        for name, value in zip(names, values, strict=True):
            setattr(detector, name, value)
        raise


def set_scale(
    detector: EfficientAD,
    maps: MapFile,
    source_sizes: Sequence[tuple[int, int]],
    distances: Sequence[float],
) -> tuple[list[float], list[float]]:
    """Set the quantiles, and the line of a global term; image scores and map means by them.

    maps: without what the term adds. distances: of the same images, by the term.
    """
    set_quantiles_from_maps(detector, maps)
    check_scale(detector, maps.count)
    found = validation_scores(detector, maps, source_sizes)
    if detector.global_term is None:
        return found
    detector.global_term.set_line(*line_of(distances, found[0], detector.affine[0].item()))
    return validation_scores(detector, maps, source_sizes, distances)


def set_quantiles_from_maps(detector: EfficientAD, maps: MapFile) -> None:
    """Set the detector's quantiles from raw validation maps, by its own border rule.

    With an `autoencoder_weight` below 1 its q_b lies further from its q_a, so that its map counts
    for less in the sum; 1 is the paper's.

    Raises:
        ValueError: no maps, a map value that is NaN, or a weight outside of 0..1.
    """
    weight = check_weight(detector.autoencoder_weight)
    found: list[float] = []
    for kind in range(2):

        def values(kind: int = kind) -> Iterator[np.ndarray]:
            for chunk in maps.chunks():
                yield quantile_values(detector, chunk[:, kind]).numpy()

        found += streaming_quantiles(values, QUANTILE_LEVELS)
    if weight != 1:
        found[3] = found[2] + (found[3] - found[2]) / weight
    detector.set_quantiles(*found)


def check_scale(detector: EfficientAD, images: int) -> None:
    """Raise ValueError where the quantiles of good images' maps set no scale."""
    q = detector.quantiles.tolist()
    for kind, qa, qb in (("st", q[0], q[1]), ("ae", q[2], q[3])):
        if not qb - qa > LEAST_SPREAD * max(abs(qa), abs(qb)):
            raise ValueError(
                f"the {kind} maps of the {images} good images are all but constant (q_a {qa:.6g}, "
                f"q_b {qb:.6g}), so that no scale for scores follows: give images of the parts"
            )


@torch.no_grad()
def validation_scores(
    detector: EfficientAD,
    maps: MapFile,
    source_sizes: Sequence[tuple[int, int]],
    distances: Sequence[float] | None = None,
) -> tuple[list[float], list[float]]:
    """Image scores and map means of stored raw maps, at the size that `score_size` names.

    distances: of the images from the good ones, where the maps are without the global term's part.
    """
    device = detector.affine.device
    scores: list[float] = []
    means: list[float] = []

    def add(st: Tensor, ae: Tensor, size: tuple[int, int]) -> None:
        anomaly_map, score = detector.anomaly_map(st, ae, size)
        scores.extend(score.tolist())
        means.extend(map_means(anomaly_map, detector.region).tolist())

    for chunk in maps.chunks():
        st, ae = chunk.to(device).unbind(dim=1)
        if distances is not None and detector.global_term is not None:
            of_chunk = torch.tensor(distances[len(scores) :][: len(chunk)], device=device)
            st = st + detector.global_term.added(of_chunk)
        if detector.score_size == "input":
            add(st, ae, detector.image_size)
            continue
        for i in range(len(chunk)):
            add(st[i : i + 1], ae[i : i + 1], source_sizes[len(scores)])
    return scores, means
