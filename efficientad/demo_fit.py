"""Floor 4, imports detector, calibration and networks: a closed-form fit for demonstration.

This is not EfficientAD training (paper, Algorithm 1): nothing is learned by gradient descent. The
networks are the genuine ones, so that everything downstream meets a real detector, but their inner
layers are random features and only last layers are fitted, by ridge regression on the good images.
It takes a minute or two instead of hours. On the drawn parts it finds stains and missing, swapped
or extra pieces, and some of the scratches; it says nothing about the accuracy of EfficientAD.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.calibration import ChannelStatistics
from efficientad.detector import EfficientAD
from efficientad.networks import PDN, Encoder, decoder_sizes

BATCH = 4  # images per forward pass; bounds the memory
SETTLE = 8  # images by which the random layers of the PDNs are settled
RAMPS = (1.5, 1.0, 1.0)  # where the random features saturate, per layer, in ordinary spreads
CODE_SPREAD = 0.1  # how much the autoencoder's code varies between images
BLUR = 2  # cells; radius of the blur of what the autoencoder draws
DECODER_CELLS = 256  # cells drawn per image for each layer of the decoder
DECODER_RIDGE = 1e-3  # ridge strengths, as a fraction of the mean squared, centred input
STUDENT_CELLS = 500  # cells drawn per image for the student
STUDENT_RIDGE = 3e-2


class Ridge:
    """Ridge regression from normal equations accumulated in float64; the bias is not penalised.

    Rows are centred by the first batch's mean, so that float32 products keep their digits.
    """

    def __init__(self) -> None:
        self.rows = 0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Add n samples: inputs (n, k) and targets (n, m)."""
        if not self.rows:
            self.origin_x, self.origin_y = x.mean(0), y.mean(0)
            self.gram = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)
            self.cross = torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
            self.sum_x = torch.zeros(x.shape[1], dtype=torch.float64)
            self.sum_y = torch.zeros(y.shape[1], dtype=torch.float64)
        x, y = x - self.origin_x, y - self.origin_y
        self.gram += x.T @ x
        self.cross += x.T @ y
        self.sum_x += x.sum(0, dtype=torch.float64)
        self.sum_y += y.sum(0, dtype=torch.float64)
        self.rows += len(x)

    def solve(self, strength: float) -> tuple[Tensor, Tensor]:
        """Weight (m, k), bias (m,), float64; `strength` is relative to the mean squared input."""
        mean_x, mean_y = self.sum_x / self.rows, self.sum_y / self.rows
        gram = self.gram - self.rows * torch.outer(mean_x, mean_x)
        cross = self.cross - self.rows * torch.outer(mean_x, mean_y)
        diagonal = gram.diagonal()
        diagonal += strength * diagonal.mean() + 1e-12
        weight = torch.cholesky_solve(cross, torch.linalg.cholesky(gram)).T
        return weight, mean_y + self.origin_y - weight @ (mean_x + self.origin_x)


def _batches(images: Tensor) -> Iterator[Tensor]:
    return iter(images.split(BATCH))


def _set_conv(conv: nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    conv.weight.copy_(weight.reshape(conv.weight.shape))
    conv.bias.copy_(bias)


def _spread(y: Tensor) -> tuple[Tensor, Tensor]:
    """Median, spread (C,) of y (N, C, h, w): half the 15 to 85 % range, at most the std."""
    rows = y.permute(1, 0, 2, 3).flatten(1)
    rows = rows[:, :: max(1, rows.shape[1] // 30_000)]
    low, middle, high = torch.quantile(rows, torch.tensor([0.15, 0.5, 0.85]), dim=1)
    return middle, torch.minimum((high - low) / 2, rows.std(1)).clamp(min=1e-6)


def _random_pdn(pdn: PDN, x: Tensor, generator: torch.Generator) -> None:
    """Random features that saturate, in every layer of a PDN-S, settled on normalised images x.

    Channels come in pairs of one filter and two biases, ReLU(u) and ReLU(u - 1), and the next layer
    takes a pair with opposite weights: clip(u, 0, 1). The ramp is as wide as what the filter
    ordinarily meets, so that a printed edge does not drown all that is fainter.
    """
    for i, conv in enumerate((pdn.conv1, pdn.conv2, pdn.conv3)):
        pairs, channels = conv.out_channels // 2, conv.in_channels // (2 if i else 1)
        weight = torch.randn((pairs, channels, *conv.kernel_size), generator=generator)
        if i:
            weight = torch.stack([weight, -weight], 2).flatten(1, 2)
        else:  # every other filter sees no flat colour, only its changes
            weight[::2] -= weight[::2].mean((2, 3), keepdim=True)
        middle, spread = _spread(F.conv2d(x, weight))
        ramp = spread * RAMPS[i]
        start = middle - ramp * torch.rand(pairs, generator=generator)
        weight = (weight / ramp.view(-1, 1, 1, 1)).repeat_interleave(2, 0)
        _set_conv(conv, weight, torch.stack([-start / ramp, -start / ramp - 1], 1).flatten())
        x = F.relu(conv(x))
        x = F.avg_pool2d(x, 2, 2) if i < 2 else x
    weight = torch.randn((pdn.conv4.out_channels, 128, 4, 4), generator=generator)
    weight = torch.stack([weight, -weight], 2).flatten(1, 2)
    std, mean = torch.std_mean(F.conv2d(x, weight), (0, 2, 3))
    _set_conv(pdn.conv4, weight / std.view(-1, 1, 1, 1), -mean / std)


def _random_encoder(encoder: Encoder, images: Tensor, generator: torch.Generator) -> Tensor:
    """Random features in every layer of the encoder; returns the codes (N, 64, 1, 1) of all images.

    A code is mostly the same for every image, `CODE_SPREAD` against 3, so that
    the decoder draws a template and bends it a little.
    """
    x = images
    for i in range(1, 7):
        conv = getattr(encoder, f"enconv{i}")
        weight = torch.randn(conv.weight.shape, generator=generator)
        y = torch.cat([F.conv2d(b, weight, None, conv.stride, conv.padding) for b in _batches(x)])
        std, mean = torch.std_mean(y, (0, 2, 3))
        std = std.clamp(min=1e-6)
        wanted = torch.randn(len(std), generator=generator)
        if i == 6:
            std, wanted = std / CODE_SPREAD, 3 * wanted
        _set_conv(conv, weight / std.view(-1, 1, 1, 1), wanted - mean / std)
        x = (y - mean.view(1, -1, 1, 1)) / std.view(1, -1, 1, 1) + wanted.view(1, -1, 1, 1)
        x = F.relu(x) if i < 6 else x
    return x


def _draw_cells(
    x: Tensor, conv: nn.Conv2d, target: Tensor, limit: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Inputs (n, k) of `conv` in x at up to `limit` random cells, and the target there (n, m)."""
    (kh, kw), (ph, pw) = conv.kernel_size, conv.padding
    width = target.shape[3]
    drawn = torch.randperm(target.shape[2] * width, generator=generator)[:limit]
    row, col = drawn // width, drawn % width
    x = F.pad(x, (pw, pw, ph, ph)).permute(0, 2, 3, 1)  # [N, H, W, C]
    taps = [x[:, row + i, col + j] for i in range(kh) for j in range(kw)]
    patches = torch.stack(taps, -1).flatten(2).flatten(0, 1)  # [N * cells, C * kh * kw]
    return patches, target.flatten(2)[:, :, drawn].permute(0, 2, 1).flatten(0, 1)


def _solve_conv(
    conv: nn.Conv2d,
    inputs: Iterable[Tensor],
    targets: Iterable[Tensor],
    cells: int,
    strength: float,
    generator: torch.Generator,
) -> None:
    """Set `conv` so that its outputs follow the targets (n, m, h, w), batch by batch."""
    ridge = Ridge()
    for x, y in zip(inputs, targets, strict=True):
        ridge.add(*_draw_cells(x, conv, y, cells, generator))
    _set_conv(conv, *ridge.solve(strength))


def _fit_statistics(detector: EfficientAD, images: Tensor) -> list[Tensor]:
    """Set the teacher's channel statistics; return its normalised features, batch by batch."""
    features = [detector.teacher(x) for x in _batches(images)]
    statistics = ChannelStatistics()
    for y in features:
        statistics.add(y)
    detector.set_statistics(*statistics.result())
    return [(y - detector.teacher_mean) / detector.teacher_std for y in features]


def _fit_autoencoder(
    detector: EfficientAD, images: Tensor, features: list[Tensor], generator: torch.Generator
) -> list[Tensor]:
    """Random encoder; decoder solved layer by layer, from coarse to fine; returns its outputs.

    The goal is the teacher's picture, blurred: what belongs where, not its texture. Half of a
    layer's 64 channels follow the 32 principal components of that picture, at the layer's
    resolution, and half their negatives, so that nothing is lost to the ReLU.
    """
    autoencoder, decoder = detector.autoencoder, detector.autoencoder.decoder
    features = [
        F.avg_pool2d(F.pad(y, (BLUR,) * 4, mode="replicate"), 2 * BLUR + 1, 1) for y in features
    ]
    rows = [y.permute(1, 0, 2, 3).flatten(1) for y in features]
    axes = torch.linalg.eigh(sum((r @ r.T).double() for r in rows))[1][:, -32:].float()
    scene = torch.cat([torch.einsum("nchw,ck->nkhw", y, axes) for y in features])
    scene = torch.cat([scene, -scene], 1) / scene.std()

    x = _random_encoder(autoencoder.encoder, images, generator)
    for i, size in enumerate(decoder_sizes(images.shape[2]), start=1):
        conv = getattr(decoder, f"deconv{i}")
        x = F.interpolate(x, size=(size, size), mode="bilinear")
        out = size + 2 * conv.padding[0] - conv.kernel_size[0] + 1
        goals = [
            F.interpolate(s, (out, out), mode="bilinear", antialias=True) for s in _batches(scene)
        ]
        _solve_conv(conv, _batches(x), goals, DECODER_CELLS, DECODER_RIDGE, generator)
        x = torch.cat([F.relu(conv(b)) for b in _batches(x)])
    _solve_conv(decoder.deconv8, _batches(x), features, DECODER_CELLS, DECODER_RIDGE, generator)
    return [decoder.deconv8(b) for b in _batches(x)]


def _student_trunk(student: PDN, x: Tensor) -> Tensor:
    """The input of a PDN-S's last convolution, (N, 256, h + 3, w + 3)."""
    x = F.avg_pool2d(F.relu(student.conv1(x)), 2, 2)
    x = F.avg_pool2d(F.relu(student.conv2(x)), 2, 2)
    return F.relu(student.conv3(x))


@torch.no_grad()
def closed_form_detector(
    good_images: Tensor | Iterable[Tensor],
    *,
    seed: int = 0,
    teacher: Mapping[str, Tensor] | None = None,
) -> EfficientAD:
    """Fit an EfficientAD-S to good images without gradient descent, for demonstrations.

    Teacher: random features, standardised layer by layer on the good images, or `teacher`.
    Autoencoder: random encoder; decoder fitted layer by layer so that it draws what the normalised
    teacher sees on good parts, place by place. Student: other random features; its last
    convolution is solved by ridge regression to imitate teacher and autoencoder on good parts.

    Args:
        good_images: (N, 3, 256, 256) RGB float in 0..1, N >= 2, or batches of them; about 60
            images are enough.
        seed: of every random number; the same seed and images give the same detector.
        teacher: state dict of a PDN-S teacher to use in place of the random one.

    Returns:
        A detector with channel statistics set, and quantiles and threshold unset: calibrate it on
        good images that were not in `good_images`.

    Raises:
        ValueError: wrong shape or dtype of `good_images`.
    """
    if not isinstance(good_images, Tensor):
        batches = list(good_images)
        good_images = torch.cat(batches) if batches else torch.empty(0)
    if good_images.dim() != 4 or good_images.shape[1:] != (3, 256, 256) or len(good_images) < 2:
        raise ValueError(
            f"good_images has shape {tuple(good_images.shape)}; it must be (N, 3, 256, 256), N >= 2"
        )
    if not good_images.is_floating_point():
        raise ValueError(f"good_images has dtype {good_images.dtype}; it must be float in 0..1")
    generator = torch.Generator().manual_seed(2 * seed + 1)  # the same whatever the teacher
    detector = EfficientAD("S")
    images = detector.normalize(good_images.detach().float().cpu())
    if teacher is None:
        _random_pdn(detector.teacher, images[:SETTLE], torch.Generator().manual_seed(2 * seed))
    else:
        detector.teacher.load_state_dict(teacher)
    _random_pdn(detector.student, images[:SETTLE], generator)
    features = _fit_statistics(detector, images)
    scenes = _fit_autoencoder(detector, images, features, generator)
    trunks = (_student_trunk(detector.student, x) for x in _batches(images))
    goals = (torch.cat(pair, 1) for pair in zip(features, scenes, strict=True))
    _solve_conv(detector.student.conv4, trunks, goals, STUDENT_CELLS, STUDENT_RIDGE, generator)
    detector.provenance = {"fit": "closed-form demonstration, not EfficientAD training"}
    return detector
