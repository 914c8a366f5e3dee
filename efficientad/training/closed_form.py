"""Last layers in closed form: ridge regressions on sampled cells, no gradient step.

The student's last layer predicts the teacher's standardised features and the autoencoder's output
from the student's own inner features; the autoencoder's last layer predicts the teacher's features
from its decoder's. Each is linear, so one pass over the images that sums products of sampled cells
settles all three. A strong penalty keeps the student from becoming the teacher itself where both
have the same inner layers: it then errs where the features are unlike those of the good images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.model.calibration import ChannelStatistics, Progress
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import PDN, TEACHER_CHANNELS, same_inner_layers
from efficientad.model.region import index_of, of_cells
from efficientad.training.losses import FIRST, SECOND, teacher_features, trunk
from efficientad.training.pictures import TrainingImages, to_rgb
from efficientad.utils.processes import computing
from efficientad.utils.sampling import random_numbers

CELLS = 150_000  # sampled in all
GAINS = (0.85, 1.1)  # of an image's brightness, drawn uniformly: lines drift in brightness
# Penalties, as parts of the mean eigenvalue of the inputs' covariance.
STUDENT_RIDGE = 0.4
SECOND_RIDGE = 16.0  # what the autoencoder is compared with stays near the mean
AUTOENCODER_WEIGHT = 0.5  # of its map, which measures brightness most of all (docs/training.md)
DECODER_RIDGE = 1e-2  # its features are few and alike: below, float32 sums have no Cholesky factor
_BLOCK = 4096  # rows of one sum in float32
_COLUMNS = 1024  # of a product at a time: half of the symmetric matrix is never computed


class Moments:
    """Means and covariances of named groups of variables, from rows that come in blocks.

    Products are summed in float32 within a block, about the first block's mean, and in float64 over
    the blocks.

    Args:
        widths: variables of each group, by name.
    """

    def __init__(self, **widths: int) -> None:
        ends = torch.tensor(list(widths.values())).cumsum(0).tolist()
        self._groups = {
            name: slice(end - width, end)
            for end, (name, width) in zip(ends, widths.items(), strict=True)
        }
        self._products = torch.zeros(ends[-1] + 1, ends[-1] + 1, dtype=torch.float64)
        self._origin: Tensor | None = None
        self._pending: list[Tensor] = []

    def add(self, **rows: Tensor) -> None:
        """Add rows (n, width) of every group."""
        self._pending.append(torch.cat([rows[name].float() for name in self._groups], dim=1))
        if sum(map(len, self._pending)) >= _BLOCK:
            self._sum_up()

    def _sum_up(self) -> None:
        """The lower triangle of rows^T rows; the last variable is 1, so that it holds the sums."""
        rows = torch.cat(self._pending)
        self._pending.clear()
        if self._origin is None:
            self._origin = rows.mean(0)
        rows = F.pad(rows - self._origin, (0, 1), value=1.0)
        for first in range(0, rows.shape[1], _COLUMNS):
            part = slice(first, first + _COLUMNS)
            self._products[first:, part] += rows[:, first:].T @ rows[:, part]

    @property
    def count(self) -> int:
        """Rows so far."""
        return int(self._products[-1, -1]) + sum(map(len, self._pending))

    def regress(self, inputs: str, targets: str, ridge: float) -> tuple[Tensor, Tensor]:
        """Targets as a linear function of inputs that minimises the squared error and a penalty.

        The penalty is `ridge` times the mean eigenvalue of the inputs' covariance on every weight,
        and none on the bias. The targets are a group behind the inputs.

        Returns:
            weight (targets, inputs) and bias (targets,), float64.
        """
        if self._pending:
            self._sum_up()
        assert self._origin is not None
        x, y = self._groups[inputs], self._groups[targets]
        n, sums, origin = self._products[-1, -1], self._products[-1, :-1], self._origin.double()
        means = sums / n
        cross = self._products[y, x] / n - torch.outer(means[y], means[x])
        covariance = self._products[x, x] / n
        covariance = covariance.tril() + covariance.tril(-1).T - torch.outer(means[x], means[x])
        eigenvalue = covariance.trace().clamp(min=0) / len(covariance)
        # Inputs that never change have rounding errors for a covariance; the sum drowns these.
        least = 1e-12 * origin[x].square().mean() + torch.finfo(torch.float64).tiny
        covariance.diagonal().add_(ridge * eigenvalue + least)
        weight = torch.cholesky_solve(cross.T, torch.linalg.cholesky(covariance)).T
        bias = (means + origin)[y] - weight @ (means + origin)[x]
        return weight, bias


def facts() -> dict[str, Any]:
    """What a detector's file says of it."""
    ridges = {"student": STUDENT_RIDGE, "second half": SECOND_RIDGE, "decoder": DECODER_RIDGE}
    return {"cells": CELLS, "gains": list(GAINS), "ridge": ridges}


class View(NamedTuple):
    """One look at a training image: the factor of its brightness, and the cells that count."""

    gain: float
    cells: Tensor  # (n,) of those of a distance map that are inspected


def views(seed: int, index: int, images: int, cells: int, in_map: int) -> list[View]:
    """What is sampled of image `index` of `images`, so that there are about `cells` in all.

    Few images are looked at several times, at different brightness.
    """
    each = -(-cells // images)
    count = -(-each // in_map)
    found = []
    for number in range(count):
        rng = random_numbers(seed, "closed form", index, number)
        gain = float(rng.uniform(*GAINS))
        chosen = rng.choice(in_map, min(-(-each // count), in_map), replace=False)
        found.append(View(gain, torch.from_numpy(chosen)))
    return found


def patches(x: Tensor, conv: nn.Conv2d, cells: Tensor) -> Tensor:
    """What a stride-1 convolution reads at cells of its output: (1, C, H, W) -> (n, K * K * C)."""
    kernel, padding = int(conv.kernel_size[0]), int(conv.padding[0])
    x = F.pad(x, (padding,) * 4)[0].permute(1, 2, 0).contiguous()
    rows, columns = (length - kernel + 1 for length in x.shape[:2])
    down, right, one = x.stride()
    windows = x.as_strided(
        (rows, columns, kernel, kernel, x.shape[2]), (down, right, down, right, one)
    )
    return windows[cells // columns, cells % columns].flatten(1)


def filters(conv: nn.Conv2d) -> Tensor:
    """The weights in the order of `patches`: (Cout, K * K * Cin)."""
    return conv.weight.permute(0, 2, 3, 1).flatten(1)


@torch.no_grad()
def set_filters(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Set a convolution's weights (Cout, K * K * Cin), in the order of `patches`, and its bias."""
    out_channels, in_channels, kernel, _ = conv.weight.shape
    shaped = weight.view(out_channels, kernel, kernel, in_channels).permute(0, 3, 1, 2)
    conv.weight.copy_(shaped)
    assert conv.bias is not None
    conv.bias.copy_(bias)


@torch.no_grad()
def solve_last_layers(
    detector: EfficientAD,
    images: TrainingImages,
    *,
    seed: int,
    autoencoder: bool = True,
    half: bool = False,
    cells: int | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> None:
    """Set the channel statistics and the last layers of student and autoencoder, in place.

    Args:
        detector: with its teacher's weights and the inner layers that it keeps; on a CPU.
        images: good images; unreadable ones are left out.
        autoencoder: False sets the student's first half alone.
        half: inner layers in bfloat16, where the processor multiplies it.
        cells: of the distance maps, sampled over all images; None: `CELLS`. With a region its
            share of them, inside it.
        progress: called with ("closed form", images so far, images in all).

    Raises:
        ValueError: no image can be read, too many are of one colour, or they show the teacher
            nothing.
    """
    statistics = ChannelStatistics()
    groups = ("inputs", "decoder", "teacher") if autoencoder else ("inputs", "teacher")
    moments = _moments(detector, images, seed, half, cells, workers, progress, groups, statistics)
    detector.set_statistics(*statistics.of_teacher())
    mean, std = (v.double().flatten() for v in (detector.teacher_mean, detector.teacher_std))
    weight, bias = moments.regress("inputs", "teacher", STUDENT_RIDGE)
    _set_half(detector, FIRST, weight / std[:, None], (bias - mean) / std)
    if autoencoder:
        last = detector.autoencoder.decoder.deconv8
        weight, bias = moments.regress("decoder", "teacher", DECODER_RIDGE)
        set_filters(last, weight / std[:, None], (bias - mean) / std)
        _set_second_half(detector, moments)


@torch.no_grad()
def solve_second_half(
    detector: EfficientAD,
    images: TrainingImages,
    *,
    seed: int,
    half: bool = False,
    cells: int | None = None,
    workers: int = 2,
    progress: Progress | None = None,
) -> None:
    """Set what the autoencoder is compared with anew, on the student's inner layers as they are.

    Everything else stays. Arguments and errors as `solve_last_layers`.
    """
    groups = ("inputs", "decoder")
    moments = _moments(detector, images, seed, half, cells, workers, progress, groups, None)
    _set_second_half(detector, moments)


def _moments(
    detector: EfficientAD,
    images: TrainingImages,
    seed: int,
    half: bool,
    cells: int | None,
    workers: int,
    progress: Progress | None,
    groups: Sequence[str],
    statistics: ChannelStatistics | None,
) -> Moments:
    """Sums over sampled cells: "inputs" of the student's last layer, "decoder" features, "teacher".

    groups: those of the three that are wanted. statistics: gets the teacher's features of all
    images; None: the teacher is not run.
    """
    computing()
    cells = CELLS if cells is None else cells
    height, width = detector.feature_size()
    teacher, student, decoder = detector.teacher, detector.student, detector.autoencoder.decoder
    shared = same_inner_layers(teacher, student)
    widths = {
        "inputs": math.prod(student.last.weight.shape[1:]),
        "decoder": math.prod(decoder.deconv8.weight.shape[1:]),
        "teacher": TEACHER_CHANNELS,
    }
    moments = Moments(**{name: widths[name] for name in groups})
    count = len(images)
    inspected = index_of(detector.region_cells)
    in_map = height * width if inspected is None else len(inspected)
    cells = -(-cells * in_map // (height * width))  # as many looks as without a region
    for i, found in images.read_all("closed form", workers, progress):
        image = to_rgb(torch.tensor(found)[None], detector.affine.device)
        if statistics is not None:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                features = teacher_features(detector, image)
            statistics.add(of_cells(features.float(), inspected))
        for gain, sampled in views(seed, i, count, cells, in_map):
            chosen = sampled if inspected is None else inspected[sampled]
            x = detector.normalize((image * gain).clamp_(0, 1))
            rows = {"inputs": _read_by_last(student, x, chosen, half)}
            if "decoder" in groups:
                # Untrained, it hardly answers to its image: bfloat16 would round that away.
                decoded = decoder.inner(detector.autoencoder.encoder(x), detector.image_size)
                rows["decoder"] = patches(decoded, decoder.deconv8, chosen)
            if "teacher" in groups:
                read = rows["inputs"] if shared else _read_by_last(teacher, x, chosen, half)
                rows["teacher"] = F.linear(read, filters(teacher.last), teacher.last.bias)
            moments.add(**rows)
    return moments


def _read_by_last(network: PDN, x: Tensor, cells: Tensor, half: bool) -> Tensor:
    """What a PDN's last layer reads of a normalised image at cells of its output."""
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        inner = trunk(network, x)
    return patches(inner.float(), network.last, cells)


def _set_half(detector: EfficientAD, half: slice, weight: Tensor, bias: Tensor) -> None:
    """Set one half of the student's last layer, and leave the other as it is."""
    last = detector.student.last
    assert last.bias is not None
    weights, biases = filters(last).double(), last.bias.detach().double()
    weights[half], biases[half] = weight, bias
    set_filters(last, weights, biases)


def _set_second_half(detector: EfficientAD, moments: Moments) -> None:
    """Set the student's second half by regression.

    The autoencoder's output is linear in the decoder's features, so predicting these is enough.
    """
    last = detector.autoencoder.decoder.deconv8
    assert last.bias is not None
    own, own_bias = filters(last).double(), last.bias.double()
    second, offset = moments.regress("inputs", "decoder", SECOND_RIDGE)
    _set_half(detector, SECOND, own @ second, own @ offset + own_bias)
