"""What a predictor computes with.

A backend turns packed images into distance maps and these into anomaly maps. `KernelBackend` runs
the Triton kernels, `Fp8Backend` too, with layers in fp8, and `TorchBackend` the folded torch
network; they have the same methods, so that the predictor and its CUDA graphs do not know which
they hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress

import torch
from torch import Tensor

from efficientad.fast.folded_network import FoldedNetwork, network_name
from efficientad.fast.folding import FoldedWeights, fold
from efficientad.fast.folding_fp8 import fold_fp8
from efficientad.fast.fused_network import (
    Plan,
    Workspace,
    autoencoder,
    distance_maps,
    distance_maps_in_turn,
    forward,
    trunk,
)
from efficientad.model.detector import EfficientAD
from efficientad.model.global_term import HiddenTerm
from efficientad.model.image_score import ScoreRule, scored
from efficientad.model.region import resized
from efficientad.ops import reference
from efficientad.ops.kernel_launch import kernel_by, overlapped
from efficientad.utils.devices import full_float32

Maps = tuple[Tensor, Tensor]
PDL_CAPABILITY = (9, 0)
# The largest batch in which all waits for the autoencoder, see `distance_maps_in_turn`: chosen on
# measurements whose raw file was lost; the next GPU run decides.
IN_TURN = 1
# Whether the autoencoder's kernels start while the one before still runs (programmatic dependent
# launch, from sm_90 on): not measured yet, the next GPU run decides.
PDL = False


class RegionMasks:
    """What `reference.anomaly_map` asks for as its region, in tensors that stay where they are.

    Args:
        detector: with a region, which is copied. device: where the masks lie.
    """

    def __init__(self, detector: EfficientAD, device: torch.device) -> None:
        assert detector.region is not None
        assert detector.region_cells is not None
        self.padding = detector.map_padding
        self.pixels, self.cells = (
            mask.to(device, copy=True) for mask in (detector.region, detector.region_cells)
        )

    def reload(self, detector: EfficientAD) -> None:
        """Take over another detector's region, in place."""
        assert detector.region is not None
        assert detector.region_cells is not None
        self.pixels.copy_(detector.region)
        self.cells.copy_(detector.region_cells)

    def of(self, size: tuple[int, int], padding: int) -> tuple[Tensor, Tensor]:
        """For a map of `size` with so many cells put around it: the detector's, or 0 for the bare
        cells. bool: of the map, and of the distance maps."""
        whole = self.pixels if padding == self.padding else self.cells
        return resized(whole, size), self.cells


def region_masks(detector: EfficientAD, device: torch.device) -> RegionMasks | None:
    """The masks of a detector with a region; None of one without."""
    return None if detector.region is None else RegionMasks(detector, device)


def hidden_term(detector: EfficientAD, device: torch.device) -> HiddenTerm | None:
    """What adds the global term of a detector; None of one without."""
    term = detector.global_term
    return None if term is None else HiddenTerm(detector.student, term, device)


class Kernels:
    """The Triton kernels under the names of `efficientad.ops.reference`, without checks.

    Args:
        way: how they are launched, see `kernels.launching`; None is Triton's own way.
        target: compute capability whose tiles they take; None is that of the tensors' device.
    """

    def __init__(self, way: Callable | None = None, *, target: int | None = None) -> None:
        self._way, self._target = way, target

    def __getattr__(self, name: str):
        function = kernel_by(name, self._way, self._target)
        setattr(self, name, function)
        return function


class KernelBackend:
    """The fused kernels, with every activation in a buffer that is kept.

    Args:
        detector: calibrated; its weights are read.
        dtype: float16 or bfloat16.
        device: a CUDA device from sm_80 on, or the CPU in Triton's interpreter (tests).
        kernels: the kernels; None compiles them.

    The first run must have the largest batch; see `fused_network.Workspace`.
    """

    name = "triton kernels"
    channels = 4

    def __init__(
        self,
        detector: EfficientAD,
        dtype: torch.dtype,
        device: torch.device,
        kernels: Kernels | None = None,
    ) -> None:
        if dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}; the kernels compute in float16 or bfloat16")
        self.dtype, self.device = dtype, device
        self.packed_dtype = dtype
        self.weights = self._fold(detector)
        self.plan = Plan(
            detector.size, detector.padding, detector.image_size, detector.map_padding, device
        )
        self.border = self.plan.border
        self.region = region_masks(detector, device)
        self.whole = hidden_term(detector, device)
        self.score: ScoreRule = detector.score
        self._kernels = kernels or Kernels()
        self._workspace = Workspace()
        self._side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    def _fold(self, detector: EfficientAD) -> FoldedWeights:
        return fold(detector, self.dtype, self.device)

    def reload(self, detector: EfficientAD) -> None:
        """Take over another detector's weights and region, in place."""
        self.weights.copy_(self._fold(detector))
        if self.region is not None:
            self.region.reload(detector)
        if self.whole is not None:
            assert detector.global_term is not None
            self.whole.reload(detector.student, detector.global_term)

    def pack(self, image: Tensor, packed: Tensor, *, channels_last: bool) -> None:
        """Normalise uint8 or float images into `packed` (N, H + 2 border, W + 2 border, 4)."""
        mean, std = self.weights.image_mean, self.weights.image_std
        self._kernels.pack(
            image, mean, std, channels_last=channels_last, border=self.border, out=packed
        )

    def distance_maps(self, packed: Tensor) -> Maps:
        """Packed images -> partial maps (P, N, h, w); the autoencoder on a stream of its own."""
        run = self._workspace.runner(len(packed))
        arguments = (self.plan, self.weights, packed, self._kernels, run)
        try:
            with self._branch():
                decoded = autoencoder(*arguments)
            features = trunk(*arguments)
            added = None if self.whole is None else self.whole(features[1])
            if len(packed) <= IN_TURN:
                join = self._join
                maps = distance_maps_in_turn(self.weights, features, decoded, self._kernels, join)
                return _with(added, maps)
        except BaseException:
            # Or a capture ends in another error, and buffers are free too early. It may be lost
            # already; the cause is what counts.
            with suppress(RuntimeError):
                self._join()
            raise
        self._join()
        return _with(added, distance_maps(self.weights, features, decoded, self._kernels))

    def _join(self) -> None:
        """What follows comes after the autoencoder."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._side)

    @contextmanager
    def _branch(self) -> Iterator[None]:
        if self._side is None:
            yield
            return
        self._side.wait_stream(torch.cuda.current_stream(self.device))
        early = PDL and torch.cuda.get_device_capability(self.device) >= PDL_CAPABILITY
        with torch.cuda.stream(self._side), overlapped() if early else nullcontext():
            yield

    def anomaly_map(
        self, maps: Maps, size: tuple[int, int], padding: int, out: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Distance maps -> anomaly map (N, *size) and score (N,), of the region alone."""
        region = pixels = None
        if self.region is not None:
            pixels, cells = self.region.of(size, padding)
            region = [mask.view(torch.uint8) for mask in (pixels, cells)]
        found = self._kernels.anomaly_map(
            *maps, self.weights.affine, size, padding=padding, region=region, out=out
        )
        result = scored(self.score, found, maps[0].shape[-2:], padding, pixels)
        return result if out is None else _kept(out, result)


class Fp8Backend(KernelBackend):
    """The kernels with PDN layers in float8_e4m3fn; images and the other layers are float16.

    Args:
        detector: calibrated; its weights are read. Its quantiles are those of other maps: see
            `fp8.build_fp8`, which builds this.
        largest, layers: as in `folding_fp8.fold_fp8`.
        device: a CUDA device from sm_89 on, or the CPU in Triton's interpreter (tests).
        kernels: as in `KernelBackend`.
    """

    name = "triton kernels, fp8"

    def __init__(
        self,
        detector: EfficientAD,
        largest: Sequence[Tensor],
        layers: str,
        device: torch.device,
        kernels: Kernels | None = None,
    ) -> None:
        self._largest, self._layers = largest, layers
        super().__init__(detector, torch.float16, device, kernels)

    def _fold(self, detector: EfficientAD) -> FoldedWeights:
        return fold_fp8(detector, self._largest, self._layers, self.device)

    def reload(self, detector: EfficientAD) -> None:
        """Refused: scales, quantiles and the check of the ranking belong to one detector."""
        raise ValueError(
            "the predictor computes in fp8, whose scales and quantiles were measured with its own "
            "detector; build a new predictor with calibration images"
        )

    def definition(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """What the kernels are to give for images (N, 3, H, W): anomaly map and score.

        The operations of `efficientad.ops.reference` on the same fp8 operands.
        """
        weights = self.weights
        packed = reference.pack(
            image, weights.image_mean, weights.image_std,
            channels_last=False, border=self.border, dtype=self.dtype,
        )  # fmt: skip
        with full_float32(), torch.autocast(self.device.type, enabled=False):
            maps = forward(self.plan, weights, packed, reference)
        size, padding = self.plan.image_size, self.plan.map_padding
        region = None if self.region is None else self.region.of(size, padding)
        found = reference.anomaly_map(*maps, weights.affine, size, padding=padding, region=region)
        pixels = None if region is None else region[0]
        return scored(self.score, found, self.plan.feature_size, padding, pixels)


class TorchBackend:
    """The folded torch network in channels_last; arguments as in `KernelBackend`.

    dtype: float32, float16 (CUDA only), bfloat16 or float64. Packed images are in at least float32.
    """

    channels = 3
    border = 0

    def __init__(self, detector: EfficientAD, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.packed_dtype = torch.promote_types(dtype, torch.float32)
        self.network = FoldedNetwork(detector, dtype, device)
        self.name = network_name(dtype, device, shared=self.network.shared)
        self.region = region_masks(detector, device)
        self.whole = hidden_term(detector, device)
        self.score: ScoreRule = detector.score
        wide = torch.promote_types(dtype, torch.float32)
        self._mean, self._std, self._affine = (
            value.flatten().to(device, wide, copy=True)
            for value in (detector.image_mean, detector.image_std, detector.affine)
        )

    @torch.no_grad()
    def reload(self, detector: EfficientAD) -> None:
        """Take over another detector's weights and region, in place."""
        self.network.reload(detector)
        if self.region is not None:
            self.region.reload(detector)
        if self.whole is not None:
            assert detector.global_term is not None
            self.whole.reload(detector.student, detector.global_term)
        self.name = network_name(self.dtype, self.device, shared=self.network.shared)
        self._mean.copy_(detector.image_mean.flatten())
        self._std.copy_(detector.image_std.flatten())
        self._affine.copy_(detector.affine)

    @torch.no_grad()
    def pack(self, image: Tensor, packed: Tensor, *, channels_last: bool) -> None:
        """Normalise uint8 or float images into `packed` (N, H, W, 3)."""
        whole = reference.pack(
            image, self._mean, self._std, channels_last=channels_last, dtype=self._mean.dtype
        )
        packed.copy_(whole[..., :3])

    @torch.no_grad()
    def distance_maps(self, packed: Tensor) -> Maps:
        """Packed images -> distance maps (N, h, w)."""
        with full_float32(), torch.autocast(self.device.type, enabled=False):
            return self.network(packed.permute(0, 3, 1, 2), self.whole)

    @torch.no_grad()
    def anomaly_map(
        self, maps: Maps, size: tuple[int, int], padding: int, out: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """Distance maps -> anomaly map (N, *size) and score (N,), of the region alone."""
        region = None if self.region is None else self.region.of(size, padding)
        found = reference.anomaly_map(*maps, self._affine, size, padding=padding, region=region)
        pixels = None if region is None else region[0]
        result = scored(self.score, found, maps[0].shape[-2:], padding, pixels)
        return result if out is None else _kept(out, result)


def _with(added: Tensor | None, maps: Maps) -> Maps:
    """Partial maps (P, N, h, w), the first of the student's with what the global term adds."""
    if added is not None:
        maps[0][0] += added
    return maps


def _kept(out: Maps, result: Maps) -> Maps:
    """A result in the buffers `out`, where it may lie already."""
    for place, value in zip(out, result, strict=True):
        if place is not value:
            place.copy_(value)
    return out


Backend = KernelBackend | TorchBackend
