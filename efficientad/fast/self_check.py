"""Which backend a predictor gets, and proof that it computes right.

Kernels are compiled for the device they meet, by whatever Triton is installed there. Before a
predictor trusts them they run at every batch size and are compared with the float32 network.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad.fast.backends import Backend, Fp8Backend, KernelBackend, Kernels, TorchBackend
from efficientad.fast.options import unsafe_compiler
from efficientad.model.agreement import BOUNDS, difference, scale_of, worst
from efficientad.model.detector import EfficientAD
from efficientad.model.synthetic import golden_image
from efficientad.ops.fused import choose_backend
from efficientad.ops.kernel_launch import BundleLaunch
from efficientad.utils.devices import FP8

# Size of a source's map that takes the kernel's other tile than one of the network's size.
LARGE_MAP = (1024, 1024)


def repeats(device: torch.device) -> int:
    """Further runs that must give the same bits: a race shows in no other way."""
    return 20 if device.type == "cuda" else 0


def build_backend(
    detector: EfficientAD,
    dtype: torch.dtype,
    device: torch.device,
    kind: str,
    buckets: Sequence[int],
    torch_backend: type[TorchBackend] = TorchBackend,
    bundle: BundleLaunch | None = None,
) -> tuple[Backend, str | None]:
    """The backend to predict with, and why it is not the kernels where it might have been.

    Args:
        kind: "triton", "torch" or "auto": the kernels on CUDA devices from sm_80 on in half
            precision, if they compile and pass the numerical self-check, else torch.
        buckets: the batch sizes.
        torch_backend: the class of the folded torch network, here and in the self-check.
        bundle: compiled kernels. If they fail, the kernels are compiled.
    """
    if kind not in ("auto", "triton", "torch"):
        raise ValueError(f"backend is {kind!r}; it must be 'auto', 'triton' or 'torch'")
    if kind == "torch" or (kind == "auto" and choose_backend(device) == "torch"):
        reason = None
        if device.type == "cuda" and kind == "auto":
            reason = "the device is older than sm_80, or EFFICIENTAD_BACKEND says torch"
        return torch_backend(detector, dtype, device), reason
    if dtype == torch.float32:
        if kind == "triton":
            raise ValueError("backend is 'triton' and dtype is float32; use float16 or bfloat16")
        return torch_backend(detector, dtype, device), None
    problem = unsafe_compiler(device)
    for way in (bundle, None) if bundle is not None else (None,):
        if problem is None:
            found = _checked(detector, dtype, device, buckets, torch_backend, way)
            if isinstance(found, KernelBackend):
                return found, None
            if way is None:
                problem = found
            else:
                way.give_up(found)
    if kind == "triton":
        raise ValueError(f"backend is 'triton' and the kernels cannot be used: {problem}")
    warnings.warn(
        f"the Triton kernels are not used on {device}: {problem}. The predictor runs the folded "
        "torch network in its place: same results, slower",
        stacklevel=4,  # of whoever builds the predictor
    )
    return torch_backend(detector, dtype, device), problem


def _checked(
    detector: EfficientAD,
    dtype: torch.dtype,
    device: torch.device,
    buckets: Sequence[int],
    torch_backend: type[TorchBackend],
    bundle: BundleLaunch | None,
) -> KernelBackend | str:
    """The kernels, or what is wrong with them."""
    try:
        backend = KernelBackend(detector, dtype, device, Kernels(bundle))
        return self_check(backend, detector, buckets, torch_backend) or backend
    except Exception as error:  # whatever Triton or the driver raises, the line must go on
        return f"{type(error).__name__}: {error}".splitlines()[0]


@torch.no_grad()
def self_check(
    backend: Backend,
    detector: EfficientAD,
    buckets: Sequence[int],
    torch_backend: type[TorchBackend] = TorchBackend,
) -> str | None:
    """Compare the backend's maps with the float32 network's on a built-in image, at every bucket.

    A bucket has kernels of its own, and so have float images and frames. On a CUDA device further
    runs must give the same bits. Maps of an `Fp8Backend` are compared with its definition: this
    looks for broken kernels, and what fp8 itself costs is judged on calibration images
    (`efficientad.fast.fp8`). The first run of the backend, which sizes its buffers.

    Returns:
        None if they agree within BOUNDS, else what is wrong.
    """
    whole = backend.whole
    backend.whole = None  # it would drown the networks' differences, and is no kernel
    try:
        return _check_buckets(backend, detector, buckets, torch_backend)
    finally:
        backend.whole = whole


def _check_buckets(
    backend: Backend,
    detector: EfficientAD,
    buckets: Sequence[int],
    torch_backend: type[TorchBackend],
) -> str | None:
    size = detector.image_size
    levels = F.interpolate(golden_image(), size=size, mode="bilinear").mul(255).round()
    levels = levels.to(backend.device, torch.uint8)
    if isinstance(backend, Fp8Backend):
        expected, bounds = backend.definition(levels.float() / 255), BOUNDS[FP8]
    else:
        network = torch_backend(detector, torch.float32, backend.device)
        network.whole = None
        expected, bounds = _exact(network, detector, levels), BOUNDS[backend.dtype]
    for images in sorted(buckets, reverse=True):
        problem = _check_bucket(
            backend, detector, levels.expand(images, -1, -1, -1), expected, bounds
        )
        if problem is not None:
            return f"self-check failed at batch {images}: {problem}"
    return None


def _exact(network: TorchBackend, detector: EfficientAD, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Map and score by the folded torch network in float32."""
    plain = torch.empty((1, *levels.shape[2:], 3), device=network.device)
    network.pack(levels.float() / 255, plain, channels_last=False)
    maps = network.distance_maps(plain)
    return network.anomaly_map(maps, detector.image_size, detector.map_padding, None)


def _check_bucket(
    backend: Backend,
    detector: EfficientAD,
    levels: Tensor,
    expected: tuple[Tensor, Tensor],
    bounds: tuple[float, float],
) -> str | None:
    """What is wrong with the results for levels (N, 3, H, W) of 255, all of one image; or None."""
    height, width = (length + 2 * backend.border for length in detector.image_size)
    shape = (len(levels), height, width, backend.channels)
    packed, of_frames = (
        torch.empty(shape, dtype=backend.packed_dtype, device=backend.device) for _ in "ab"
    )
    backend.pack((levels.float() / 255).contiguous(), packed, channels_last=False)
    backend.pack(levels.permute(0, 2, 3, 1).contiguous(), of_frames, channels_last=True)
    step = 4 * torch.finfo(backend.dtype).eps  # normalised images are below 4
    if not bool((packed.float() - of_frames.float()).abs().max() <= step):
        return "frames and images of the same pixels are packed differently"

    def run() -> tuple[Tensor, Tensor]:
        maps = backend.distance_maps(of_frames)
        return backend.anomaly_map(maps, detector.image_size, detector.map_padding, None)

    (found, score), (anomaly_map, best) = run(), expected
    scale = scale_of(anomaly_map)
    of_map = difference(found, anomaly_map.expand(len(levels), -1, -1), scale)
    of_score = difference(score, best.expand(len(levels)), scale)
    most = worst((of_map.largest, of_score.largest))
    largest, rms = bounds
    if not (most <= largest and of_map.rms <= rms):  # true for NaN
        return (
            f"difference {most:.2g} (bound {largest:g}), RMS {of_map.rms:.2g} (bound {rms:g}) of "
            "the map's scale"
        )
    for _ in range(repeats(backend.device)):
        again, score_again = run()
        if not (torch.equal(again, found) and torch.equal(score_again, score)):
            return "two runs on the same images gave different results"
    return None


@torch.no_grad()
def rehearse(backend: KernelBackend, detector: EfficientAD, buckets: Sequence[int]) -> None:
    """Launch each kernel that a predictor launches, at its construction and by later calls.

    What the kernels write is looked at by nobody: for `aot.building`, which only compiles them.
    """
    (height, width), device = detector.image_size, backend.device
    for images in sorted(set(buckets), reverse=True):
        border = 2 * backend.border
        shape = (images, height + border, width + border, backend.channels)
        packed = torch.empty(shape, dtype=backend.packed_dtype, device=device)
        frames = torch.empty((images, height, width, 3), dtype=torch.uint8, device=device)
        backend.pack(frames, packed, channels_last=True)
        image = torch.empty((images, 3, height, width), device=device)
        backend.pack(image, packed, channels_last=False)
        maps = backend.distance_maps(packed)
        backend.anomaly_map(maps, detector.image_size, detector.map_padding, None)
        rows, columns = maps[0].shape[-2:]
        backend.anomaly_map(maps, (rows, columns), 0, None)
        for size in (detector.image_size, LARGE_MAP):
            one = (maps[0][:, :1].contiguous(), maps[1][:, :1].contiguous())
            backend.anomaly_map(one, size, detector.map_padding, None)
