"""The EfficientAD detector that defines the numbers.

Source: arXiv 2303.14535, Algorithm 2 (inference). The border rules are those of the published
implementations; `docs/border-rules.md` shows what they differ in and why "nelson" is the default.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from efficientad.model.global_term import WHOLE_OR_PART, GlobalTerm, student_means
from efficientad.model.image_score import ScoreRule, check_score, check_threshold, scored
from efficientad.model.map_rule import affine_of, check_border, check_quantiles, check_statistics
from efficientad.model.networks import (
    PDN,
    STUDENT_CHANNELS,
    TEACHER_CHANNELS,
    Autoencoder,
    check_image_size,
    check_pair,
    feature_size,
)
from efficientad.model.output import AnomalyOutput
from efficientad.model.region import RegionLike, check_cells, fitted, masks_of
from efficientad.ops import reference
from efficientad.utils.checks import check_flag
from efficientad.utils.devices import keep_wide
from efficientad.utils.processes import pickled_by_content

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
SCORE_SIZES = ("input", "source")
QUANTILE_LEVELS = (0.9, 0.995)  # q_a and q_b of the paper


class UncalibratedError(ValueError):
    """A score was asked of a detector whose statistics or quantiles are not set."""


@pickled_by_content
class EfficientAD(nn.Module):
    """Teacher, student, autoencoder, channel statistics, map quantiles and threshold.

    Args:
        size: "S" or "M", the PDN of teacher and student.
        padding: True for the padded PDN (64 cells at 256 pixels), False for the deployed one (56).
        image_size: (height, width) in pixels that images are resized to, each >= 256.
        border: how the maps' frame and the quantiles are defined:
            "nelson": quantiles of the raw feature maps; the frame of the anomaly map is 0.
            "anomalib": quantiles of the zero-padded, resized maps; the frame is a distance of 0.
            "paper": quantiles of the resized maps, no frame; for the padded PDN only.
            None: "nelson" for the unpadded PDN, "paper" for the padded one.
        map_padding: cells added on every side of a map before it is resized. None: 4 for the
            unpadded PDN, 0 for the padded one.
        score_size: "input" (score of the map at `image_size`) or "source" (at the image's own size,
            as nelson1425 evaluates). It is kept for whoever resizes maps; `forward` sees no source.

    A new detector has random weights, unset statistics and unset quantiles: `distance_maps` works,
    `forward` raises `UncalibratedError`. Weights may be cast (`.half()`, `.bfloat16()`); statistics
    and quantiles stay in at least float32, and so do the distances.
    """

    image_mean: Tensor
    image_std: Tensor
    teacher_mean: Tensor
    teacher_std: Tensor
    quantiles: Tensor
    affine: Tensor
    _region: Tensor | None
    _cells: Tensor | None
    value_range: tuple[float, float] | None = None  # of samples above 8 bits: data/samples.py
    autoencoder_weight: float = 1.0  # of its map beside the student's: calibration.py
    _score: ScoreRule = "max"
    global_term: GlobalTerm | None  # set by `set_global_term`

    def __init__(
        self,
        size: str = "S",
        *,
        padding: bool = False,
        image_size: tuple[int, int] = (256, 256),
        border: str | None = None,
        map_padding: int | None = None,
        score_size: str = "input",
    ):
        super().__init__()
        self.size = size
        check_flag("padding", padding)
        self.padding = padding
        if score_size not in SCORE_SIZES:
            raise ValueError(f"score_size is {score_size!r}; it must be 'input' or 'source'")
        self.score_size = score_size
        self.teacher = PDN(size, TEACHER_CHANNELS, padding).requires_grad_(False)
        self.student = PDN(size, STUDENT_CHANNELS, padding)
        self.autoencoder = Autoencoder(padding)
        self.register_module("global_term", None)
        self.register_buffer("image_mean", torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1))
        self.register_buffer("image_std", torch.tensor(IMAGENET_STD).view(1, 3, 1, 1))
        channels = (1, TEACHER_CHANNELS, 1, 1)
        self.register_buffer("teacher_mean", torch.zeros(channels))
        self.register_buffer("teacher_std", torch.ones(channels))
        self.register_buffer("quantiles", torch.full((4,), float("nan")))
        self.register_buffer("affine", torch.full((4,), float("nan")), persistent=False)
        self.register_buffer("_region", None, persistent=False)
        self.register_buffer("_cells", None, persistent=False)
        self.threshold = None
        self.provenance: dict[str, Any] = {}
        self._has_statistics = False
        self._calibrated = False
        self.border = border if border is not None else ("paper" if padding else "nelson")
        self.map_padding = check_border(self.border, self.padding, map_padding)
        self.image_size = check_pair(image_size)
        self.register_load_state_dict_post_hook(_resolve_after_load)
        self.eval()

    # ---- calibration state -------------------------------------------------------------------

    @property
    def threshold(self) -> float | None:
        """The image score above which an image is anomalous; None judges nothing.

        ValueError where it is set to anything but a finite number or None.
        """
        return self._threshold

    @threshold.setter
    def threshold(self, value: float | None) -> None:
        self._threshold = check_threshold(value)

    @property
    def score(self) -> ScoreRule:
        """How a map becomes a score: "max", or k for the mean of its k largest cells.

        Setting another clears the threshold and the record of the calibration.
        """
        return self._score

    @score.setter
    def score(self, value: ScoreRule) -> None:
        new = check_score(value, self.feature_size())
        if new != self._score:
            self._score, self.threshold = new, None
            self.provenance.pop("calibration", None)

    def set_global_term(self, term: GlobalTerm | None) -> None:
        """Add what makes an image odd as a whole to its student-teacher map, or no longer.

        Clears the threshold and the record of the calibration.

        Raises:
            ValueError: the detector has a region, outside of which nothing may count.
        """
        if term is not None and self._region is not None:
            raise ValueError(WHOLE_OR_PART)
        self.global_term = None if term is None else term.to(self.affine.device)
        self.threshold = None
        self.provenance.pop("calibration", None)

    @property
    def has_statistics(self) -> bool:
        """Whether the teacher's channel statistics are set."""
        return self._has_statistics

    @property
    def calibrated(self) -> bool:
        """Whether statistics and quantiles are set, so that scores mean something."""
        return self._has_statistics and self._calibrated

    @torch.no_grad()
    def set_image_normalization(self, mean: Tensor, std: Tensor) -> None:
        """Set the image normalisation (3,), (3,), of RGB in 0..1; uncalibrates the detector."""
        if not torch.all(torch.as_tensor(std) > 0):
            raise ValueError(f"std is {std}; every channel must be > 0")
        self.image_mean.copy_(torch.as_tensor(mean).view(1, 3, 1, 1))
        self.image_std.copy_(torch.as_tensor(std).view(1, 3, 1, 1))
        self.clear_statistics()

    @torch.no_grad()
    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Set the teacher's channel mean and population standard deviation (384 each).

        A channel with std 0 is constant on the training images; it carries nothing and its std
        becomes 1, with a warning. Clears quantiles and threshold, which depend on the statistics.
        """
        mean, std = check_statistics(mean, std)
        self.teacher_mean.copy_(mean.reshape(self.teacher_mean.shape))
        self.teacher_std.copy_(std.reshape(self.teacher_std.shape))
        self._has_statistics = True
        self.clear_quantiles()

    @torch.no_grad()
    def set_quantiles(self, qa_st: float, qb_st: float, qa_ae: float, qb_ae: float) -> None:
        """Set the map quantiles (paper, end of Algorithm 1), found by this detector's border rule.

        Equal q_a and q_b (a constant map) get the smallest useful distance, 1e-6 of max(1, q_a),
        with a warning, so that forward never divides by zero. Clears the threshold.
        """
        values = check_quantiles(qa_st, qb_st, qa_ae, qb_ae)
        self.quantiles.copy_(torch.tensor(values, dtype=torch.float64))
        self.threshold = None
        self._resolve()

    def clear_quantiles(self) -> None:
        """Forget quantiles and threshold: the detector is uncalibrated."""
        self.quantiles.fill_(float("nan"))
        self.threshold = None
        self._resolve()

    def clear_statistics(self) -> None:
        """Forget channel statistics, quantiles and threshold."""
        self.teacher_mean.zero_()
        self.teacher_std.fill_(1.0)
        self._has_statistics = False
        self.clear_quantiles()

    def set_map_rule(
        self,
        border: str | None = None,
        map_padding: int | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> None:
        """Change border rule, map padding (cells) or input size (pixels); None keeps what is.

        The quantiles and the threshold belong to the rule they were found by, so a change marks the
        detector uncalibrated. Setting what already holds changes nothing.
        """
        new_border = self.border if border is None else border
        keep = self.map_padding if map_padding is None and new_border != "paper" else map_padding
        new_padding = check_border(new_border, self.padding, keep)
        new_size = self.image_size if image_size is None else check_pair(image_size)
        if (new_border, new_padding, new_size) == (self.border, self.map_padding, self.image_size):
            return
        before = self.border, self.map_padding, self.image_size
        self.border, self.map_padding, self.image_size = new_border, new_padding, new_size
        try:
            self.set_region(self._region)
            check_score(self._score, self.feature_size())
        except ValueError:
            self.border, self.map_padding, self.image_size = before
            raise
        self.clear_quantiles()

    @property
    def region(self) -> Tensor | None:
        """What is inspected, bool (H, W) at `image_size`; None is everything. See `set_region`."""
        return self._region

    @property
    def region_cells(self) -> Tensor | None:
        """The cells of a distance map that an inspected pixel overlaps, bool (h, w), or None."""
        return self._cells

    def set_region(self, region: RegionLike | None, *, keep_calibration: bool = False) -> None:
        """Inspect a part of every frame: outside it the map is neither score nor defect.

        The networks see the whole frame as before. Outside the map has the value of distance 0; a
        NaN there does not reach the score. Calibration and training look at the region alone.

        Args:
            region: a file that `data.region_files` describes, or bool (H, W) of the frame, of any
                size; None is the whole frame.
            keep_calibration: keep quantiles and threshold, which were found in another region and
                are cleared otherwise: for a look at a part of what they were found in.

        Raises:
            ValueError: nothing inspected, or nothing that the networks see. FileNotFoundError.
        """
        new = cells = None
        if region is not None:
            if self.global_term is not None:
                raise ValueError(WHOLE_OR_PART)
            new = fitted(region, self.image_size).to(self.affine.device)
            cells = check_cells(new, self.feature_size(), self.map_padding)
        old = self._region
        same = new is old or (new is not None and old is not None and torch.equal(new, old))
        self._region, self._cells = new, cells
        if not (same or keep_calibration):
            self.clear_quantiles()

    def _resolve(self) -> None:
        """Derive the affine map of `reference.anomaly_map` once, not in every forward."""
        q = self.quantiles.detach().to("cpu", torch.float64)
        self._calibrated = bool(torch.isfinite(q).all())
        if not self._calibrated:
            self.affine.fill_(float("nan"))
            return
        self.affine.copy_(
            torch.tensor(affine_of(*q.tolist(), border=self.border), dtype=torch.float64)
        )

    # ---- forward -----------------------------------------------------------------------------

    def normalize(self, image: Tensor) -> Tensor:
        """RGB float in 0..1 (N, 3, H, W) -> normalised, in the dtype of the weights."""
        if image.dim() != 4 or image.shape[1] != 3:
            raise ValueError(f"image has shape {tuple(image.shape)}; it must be (N, 3, H, W), RGB")
        if not image.is_floating_point():
            raise ValueError(
                f"image has dtype {image.dtype}; it must be floating point in 0..1 (uint8 / 255)"
            )
        check_image_size(image.shape[2], image.shape[3])
        dtype = self.student.conv1.weight.dtype
        return ((image.to(self.image_mean.dtype) - self.image_mean) / self.image_std).to(dtype)

    def distance_maps(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Raw maps, before the quantile normalisation (Algorithm 2, lines 1 to 6).

        Args:
            image: (N, 3, H, W) RGB float in 0..1, H and W >= 256.

        Returns:
            map_st, map_ae: (N, h, w) in at least float32; map_st with what the global term adds,
            if there is one. Unset channel statistics count as mean 0 and standard deviation 1.
        """
        x = self.normalize(image)
        teacher = (self.teacher(x) - self.teacher_mean) / self.teacher_std
        student_st, student_ae = self.student(x).chunk(2, dim=1)
        map_st = reference.distance_map(teacher, student_st)
        if self.global_term is not None:
            map_st = map_st + self.global_term(student_means(student_st))
        return map_st, reference.distance_map(self.autoencoder(x), student_ae)

    def anomaly_map(
        self, map_st: Tensor, map_ae: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Combine raw maps (N, h, w) to an anomaly map of `size` pixels and its score (N,)."""
        if not self.calibrated:
            self.raise_uncalibrated()
        grid, region = (map_st.shape[-2], map_st.shape[-1]), None
        if self._region is not None and self._cells is not None:  # they are set together
            region = masks_of(self._region, self._cells, size, grid, self.map_padding)
        found = reference.anomaly_map(
            map_st, map_ae, self.affine, size, padding=self.map_padding, region=region
        )
        pixels = None if region is None else region[0]
        return scored(self._score, found, grid, self.map_padding, pixels)

    def forward(self, image: Tensor) -> AnomalyOutput:
        """Image (N, 3, H, W), RGB float in 0..1, H and W >= 256 -> scores and maps.

        Raises:
            ValueError: wrong shape, dtype or size.
            UncalibratedError: statistics or quantiles are not set.
        """
        if not self.calibrated:
            self.raise_uncalibrated()
        map_st, map_ae = self.distance_maps(image)
        height, width = image.shape[-2:]
        anomaly_map, score = self.anomaly_map(map_st, map_ae, (height, width))
        return AnomalyOutput(score, anomaly_map, map_st, map_ae)

    def feature_size(self, image_size: tuple[int, int] | None = None) -> tuple[int, int]:
        """(h, w) of the distance maps for `image_size` pixels (the detector's own by default)."""
        height, width = image_size or self.image_size
        return feature_size(height, self.padding), feature_size(width, self.padding)

    def raise_uncalibrated(self) -> None:
        missing = "the map quantiles are"
        if not self._has_statistics:
            missing = f"the teacher's channel statistics and {missing}"
        raise UncalibratedError(
            f"the detector is not calibrated: {missing} not set, so scores have no meaning. "
            "Run `efficientad calibrate MODEL GOOD_IMAGES` or `efficientad.calibrate(detector, "
            "good_images)`; `distance_maps` gives the raw maps"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> EfficientAD:
        """Casts reach the weights; statistics and quantiles stay in at least float32."""
        names = ("image_mean", "image_std", "teacher_mean", "teacher_std", "quantiles", "affine")
        before: dict[str, Tensor] = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        keep_wide(self, before)
        return self


def check_detector(detector: object) -> None:
    """Raise ValueError unless it is an EfficientAD."""
    if isinstance(detector, EfficientAD):
        return
    kind = type(detector).__name__
    shown = f"{detector!r}, a {kind}" if isinstance(detector, (str, os.PathLike)) else f"a {kind}"
    raise ValueError(
        f"detector is {shown}; it must be an EfficientAD: load it with efficientad.load"
    )


def _resolve_after_load(module: EfficientAD, _incompatible: object) -> None:
    """After `load_state_dict`: a file without statistics or quantiles stays uncalibrated."""
    std = module.teacher_std
    identity = bool(module.teacher_mean.eq(0).all()) and bool(std.eq(1).all())
    module._has_statistics = not identity
    module._resolve()
