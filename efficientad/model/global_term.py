"""What makes an image odd as a whole, as a part that is missing or too many does.

Source: PUAD, arXiv 2402.15143: beside the map, the Mahalanobis distance of the spatial mean of the
student's features from those of good images. Here it raises the whole student-teacher map of an odd
image, so that scores, thresholds and exported files know it without knowing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from efficientad.model.networks import PDN, TEACHER_CHANNELS
from efficientad.utils.devices import full_float32, keep_wide

WHOLE_OR_PART = (
    "a detector has a region or a global term, not both: the term measures the whole image, and "
    "outside a region nothing may count"
)
FEWEST_IMAGES = 20  # whose means give a covariance


class GlobalTerm(nn.Module):
    """Means (N, 384) of the student's first half -> what each cell of its map gains, (N, 1, 1).

    max(0, slope x (distance - start)), where the distance is |(m - mean) whitening|. A new one has
    slope 0 and adds nothing: `set_line` belongs to the calibration.
    """

    mean: Tensor
    whitening: Tensor
    line: Tensor  # slope in the units of the raw map, and start

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(TEACHER_CHANNELS))
        self.register_buffer("whitening", torch.zeros(TEACHER_CHANNELS, TEACHER_CHANNELS))
        self.register_buffer("line", torch.zeros(2))

    def distance(self, means: Tensor) -> Tensor:
        """Mahalanobis distances (N,) from the good images."""
        return ((means.to(self.mean.dtype) - self.mean) @ self.whitening).square().sum(1).sqrt()

    def added(self, distance: Tensor) -> Tensor:
        """Distances (N,) -> what each cell gains (N, 1, 1)."""
        slope, start = self.line
        return (slope * (distance - start).clamp(min=0))[:, None, None]

    def forward(self, means: Tensor) -> Tensor:
        return self.added(self.distance(means))

    @torch.no_grad()
    def set_line(self, slope: float, start: float) -> None:
        """Slope and start, finite numbers; 0 and 0 add nothing."""
        self.line.copy_(torch.tensor([slope, start], dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GlobalTerm:
        """Moves reach it; it stays in at least float32, as the detector's statistics do."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        keep_wide(self, before)
        return self


def student_means(features: Tensor) -> Tensor:
    """(N, C, h, w) of the student -> spatial means of its first half (N, 384), at least float32."""
    wide = torch.promote_types(features.dtype, torch.float32)
    return features[:, :TEACHER_CHANNELS].mean((2, 3), dtype=wide)


def check_images(count: int) -> None:
    """Raise ValueError where there are fewer good images than `FEWEST_IMAGES`."""
    if count < FEWEST_IMAGES:
        raise ValueError(
            f"global_term needs at least {FEWEST_IMAGES} good images to train on; there are {count}"
        )


def fitted(means: Tensor) -> GlobalTerm:
    """The term of good images, from their means (n, 384); it has no line yet.

    The covariance is shrunk towards a multiple of the identity, as far as Ledoit and Wolf (2004)
    find best for so few images.

    Raises:
        ValueError: the images are all alike.
    """
    x = means.double()
    y = x - x.mean(0)
    covariance = y.T @ y / len(y)
    target = covariance.diagonal().mean() * torch.eye(
        len(covariance), dtype=y.dtype, device=y.device
    )
    distance = (covariance - target).square().sum()
    if not distance > 0:
        raise ValueError("the good images are all alike; no global term follows from them")
    noise = (y.square().sum(1).square().sum() / len(y) - covariance.square().sum()) / len(y)
    share = (noise / distance).clamp(max=1)
    shrunk = (1 - share) * covariance + share * target
    factor = torch.linalg.cholesky(torch.linalg.inv(shrunk))  # |y factor|^2 = y inverse y
    term = GlobalTerm()
    term.mean.copy_(x.mean(0))
    term.whitening.copy_(factor)
    return term


def line_of(
    distances: Sequence[float], scores: Sequence[float], slope_of_map: float
) -> tuple[float, float]:
    """Slope and start at which distances and scores of held-out good images weigh the same.

    Both are counted in their standard deviations, as in PUAD.

    Args:
        distances, scores: of the same images, without the term.
        slope_of_map: of the anomaly map over the raw student-teacher map.
    """
    found = torch.tensor([list(distances), list(scores)], dtype=torch.float64)
    deviations = found.std(1, correction=0)
    if not deviations[0] > 0:
        return 0.0, 0.0
    return float(deviations[1] / deviations[0]) / slope_of_map, float(found[0].mean())


class HiddenTerm:
    """The same from what the student's last layer reads: that layer is linear, and so is a mean.

    Args:
        student, term: of the detector; their numbers are copied. device: where they lie.
    """

    def __init__(self, student: PDN, term: GlobalTerm, device: torch.device) -> None:
        self._kernel = student.last.kernel_size[0]
        self._term = GlobalTerm().to(device)
        self._weight, self._bias = (t.to(device, copy=True) for t in _first_half(student))
        self.reload(student, term)

    @torch.no_grad()
    def reload(self, student: PDN, term: GlobalTerm) -> None:
        """Take over another detector's, in place."""
        weight, bias = _first_half(student)
        self._weight.copy_(weight)
        self._bias.copy_(bias)
        self._term.load_state_dict(term.state_dict())

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Features (N, H, W, C) -> (N, 1, 1), in float32 whatever is set outside."""
        with full_float32(), torch.autocast(x.device.type, enabled=False):
            return self._term(_means(x, self._kernel, self._weight, self._bias))


@torch.no_grad()
def means_of_hidden(student: PDN, x: Tensor) -> Tensor:
    """`student_means` from what the last layer reads, (N, H, W, C), without running it."""
    return _means(x, student.last.kernel_size[0], *_first_half(student))


def _first_half(student: PDN) -> tuple[Tensor, Tensor]:
    """The last layer up to channel 384: weights (K * K * C, 384) and biases, at least float32."""
    last = student.last
    assert last.bias is not None
    weight = last.weight.detach()[:TEACHER_CHANNELS].permute(2, 3, 1, 0)  # as window sums lie
    wide = torch.promote_types(weight.dtype, torch.float32)
    flat = weight.reshape(-1, TEACHER_CHANNELS).to(wide)
    return flat, last.bias.detach()[:TEACHER_CHANNELS].to(wide)


def _means(x: Tensor, kernel: int, weight: Tensor, bias: Tensor) -> Tensor:
    sums = _window_sums(_window_sums(x, 1, kernel), 2, kernel)
    cells = (x.shape[1] - kernel + 1) * (x.shape[2] - kernel + 1)
    return torch.addmm(bias, sums.flatten(1).to(weight.dtype) / cells, weight)


def _window_sums(x: Tensor, dim: int, k: int) -> Tensor:
    """Sums along `dim` of its k windows that a filter of k sees, float32; `dim` has k entries."""
    length = x.shape[dim]
    whole = x.sum(dim, dtype=torch.float32)
    sums = [
        whole
        - x.narrow(dim, 0, i).sum(dim, dtype=torch.float32)
        - x.narrow(dim, length - (k - 1 - i), k - 1 - i).sum(dim, dtype=torch.float32)
        for i in range(k)
    ]
    return torch.stack(sums, dim)
