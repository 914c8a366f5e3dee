"""A detector as ONNX or AOTInductor, run and compared.

Input `image`: (N, 3, H, W), RGB float32 in 0..1, any N, fixed H and W; image normalisation is
inside. Outputs `score` (N,) and `anomaly_map` (N, H, W), float32, raw: the threshold is metadata.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from efficientad import __version__
from efficientad.model import synthetic
from efficientad.model.agreement import difference, scale_of, worst
from efficientad.model.detector import EfficientAD, check_detector
from efficientad.model.image_score import described
from efficientad.model.networks import check_pair
from efficientad.model.region import share
from efficientad.utils.files import replace_file

FORMATS = {"onnx": ".onnx", "aoti": ".pt2"}
BATCHES = (1, 3, 8)  # compared with the detector
BOUND = 1e-4  # largest difference, as part of max(0.1, largest |map|)
MOST_IMAGES = 4096  # of a batch
_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
Run = Callable[[Tensor], tuple[Tensor, Tensor]]  # images -> scores, maps


class ExportError(ValueError):
    """The file could not be made, or does not give the detector's numbers."""


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path, format: where, and "onnx" or "aoti".
        bytes: the file's size.
        differences: images in the batch -> largest difference of scores and maps from the
            detector's, as part of max(0.1, largest |map|). Empty if it was not compared.
    """

    path: Path
    format: str
    bytes: int
    differences: dict[int, float]


def export(
    detector: EfficientAD,
    path: str | os.PathLike,
    format: str = "onnx",
    *,
    image_size: tuple[int, int] | None = None,
    verify: bool = True,
    force: bool = False,
) -> Export:
    """Write a detector as a file that runs without this package.

    The file is run at batches of 1, 3 and 8 images and compared with the detector; it gets its name
    only if every score and map agrees to 1e-4 of the maps' scale.

    Args:
        detector: calibrated; exported in float32, whatever its weights' dtype.
        path: the file; ".onnx" or ".pt2" by the format.
        format: "onnx" (one file with the weights inside; needs onnx, onnxscript and onnxruntime) or
            "aoti" (an AOTInductor package for the detector's device; needs a C++ compiler).
        image_size: (height, width) in pixels, fixed in the file; None is the detector's. So are
            the detector's region and its score: the file applies them.
        verify: False leaves the comparison out.
        force: replace an existing file.

    Raises:
        UncalibratedError: the detector has no statistics or quantiles.
        ValueError: an unknown format, suffix or a size below 256.
        FileExistsError: the file exists and `force` is not set.
        ImportError: a package is missing; the message has the line that installs it.
        ExportError: no compiler, or a file that gives other numbers, which is removed.
    """
    check_detector(detector)
    if format not in FORMATS:
        raise ValueError(f"format is {format!r}; it must be {' or '.join(map(repr, FORMATS))}")
    path = Path(path)
    if path.suffix != FORMATS[format]:
        raise ValueError(f"path is {path.name!r}; a file of format {format!r} ends in "
                         f"{FORMATS[format]!r}")  # fmt: skip
    size = detector.image_size if image_size is None else check_pair(image_size)
    if not detector.calibrated:
        detector.raise_uncalibrated()
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; use force (--force) to replace it, or another name")
    if size != detector.image_size:
        warnings.warn(
            f"image_size is {size[0]}x{size[1]}; quantiles and threshold were found at "
            f"{detector.image_size[0]}x{detector.image_size[1]} and may not fit",
            stacklevel=2,
        )
    {"onnx": _require_packages, "aoti": _require_compiler}[format]()
    wrapped = _Wrapped(detector, size)
    differences: dict[int, float] = {}

    def write(temporary: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            made = Path(folder) / f"model{FORMATS[format]}"
            with _quiet(), torch.no_grad():
                _WRITERS[format](wrapped, made, size, metadata(detector, size))
            if verify:
                differences.update(_compare(wrapped, _RUNNERS[format](made), size, path))
            shutil.copyfile(made, temporary)

    replace_file(path, write)
    return Export(path, format, path.stat().st_size, differences)


def metadata(detector: EfficientAD, image_size: tuple[int, int]) -> dict[str, str]:
    """What the file says about itself."""
    license = detector.provenance.get("teacher_license")
    return {
        "efficientad_version": __version__,
        "model": f"EfficientAD-{detector.size}",
        "padding": str(detector.padding).lower(),
        "border": detector.border,
        "map_padding": str(detector.map_padding),
        "image_height": str(image_size[0]),
        "image_width": str(image_size[1]),
        "threshold": "" if detector.threshold is None else repr(float(detector.threshold)),
        "input": "image: (N, 3, H, W), RGB float32 in 0..1",
        **_range_fact(detector.value_range),
        **({} if detector.score == "max" else {"score": described(detector.score)}),
        **({} if detector.region is None else {"inspected": str(share(detector.region))}),
        **({} if license is None else {"teacher_license": str(license)}),
    }


def _range_fact(value_range: tuple[float, float] | None) -> dict[str, str]:
    """Which numbers of a frame above 8 bits are 0 and 1 of the input, if the detector says so."""
    if value_range is None:
        return {}
    return {"value_range": " ".join(f"{value:g}" for value in value_range)}


class _Wrapped(nn.Module):
    """The detector in float32, its outputs as a pair; its region at the size of the images."""

    def __init__(self, detector: EfficientAD, image_size: tuple[int, int]) -> None:
        super().__init__()
        own = self.detector = copy.deepcopy(detector).float().eval().requires_grad_(False)
        own.image_size = image_size
        own.set_region(own.region, keep_calibration=True)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        out = self.detector(image)
        return out.score, out.anomaly_map

    @property
    def device(self) -> torch.device:
        return self.detector.affine.device


# ---- formats ---------------------------------------------------------------------------------


def _write_onnx(model: _Wrapped, path: Path, size: tuple[int, int], facts: dict[str, str]) -> None:
    program = torch.onnx.export(
        model.cpu(),
        (torch.rand(2, 3, *size),),
        dynamo=True,
        verbose=False,
        input_names=["image"],
        output_names=["score", "anomaly_map"],
        dynamic_shapes={"image": {0: torch.export.Dim("batch", min=1, max=MOST_IMAGES)}},
    )
    assert program is not None  # with dynamo it always is one
    program.model.metadata_props.update(facts)
    program.save(path, external_data=False)


def _run_onnx(path: Path) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        score, anomaly_map = session.run(["score", "anomaly_map"], {"image": images.cpu().numpy()})
        return torch.from_numpy(score), torch.from_numpy(anomaly_map)

    return run


def _write_aoti(model: _Wrapped, path: Path, size: tuple[int, int], facts: dict[str, str]) -> None:
    batch = torch.export.Dim("batch", min=1, max=MOST_IMAGES)
    image = torch.rand(2, 3, *size, device=model.device)
    program = torch.export.export(model, (image,), dynamic_shapes={"image": {0: batch}})
    torch._inductor.aoti_compile_and_package(
        program, package_path=str(path), inductor_configs={"aot_inductor.metadata": facts}
    )


def _run_aoti(path: Path) -> Run:
    package = torch._inductor.aoti_load_package(str(path))
    return lambda images: tuple(package(images))


_WRITERS = {"onnx": _write_onnx, "aoti": _write_aoti}
_RUNNERS: dict[str, Callable[[Path], Run]] = {"onnx": _run_onnx, "aoti": _run_aoti}


# ---- checks ----------------------------------------------------------------------------------


def _compare(model: _Wrapped, run: Run, size: tuple[int, int], path: Path) -> dict[int, float]:
    """Largest difference by images in the batch; ExportError past the bound."""
    images = synthetic.images(max(BATCHES), *size).to(model.device)
    with torch.no_grad():
        one_by_one = [model(image[None]) for image in images]
    scores, maps = (torch.cat(parts).cpu() for parts in zip(*one_by_one, strict=True))
    scale = scale_of(maps)
    differences = {}
    for count in BATCHES:
        score, anomaly_map = (t.cpu() for t in run(images[:count]))
        pairs = ((score, scores[:count]), (anomaly_map, maps[:count]))
        for found, expected in pairs:
            if found.shape != expected.shape:
                raise ExportError(
                    f"{path} was not written: at batch {count} a result has shape "
                    f"{tuple(found.shape)} instead of {tuple(expected.shape)}"
                )
        most = worst(difference(*pair, scale).largest for pair in pairs)
        differences[count] = most
        if not most <= BOUND:  # true for NaN
            raise ExportError(
                f"{path} was not written: at batch {count} it differs from the detector by "
                f"{most:.2g} of the maps' scale (bound {BOUND:g})"
            )
    return differences


def _require_packages() -> None:
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"format 'onnx' needs {', '.join(missing)}: run `pip install {' '.join(_PACKAGES)}` or "
            "`pip install 'efficientad[export]'`"
        )


def _require_compiler() -> None:
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        found = shutil.which(get_cpp_compiler())
    except Exception:  # torch has its own error class for it, and more than one reason
        found = None
    if found is None:
        raise ExportError(
            f"format 'aoti' compiles C++ and no compiler was found (CXX is "
            f"{os.environ.get('CXX')!r}, tried {config.cpp.cxx}): install g++ or clang++, or set "
            "CXX; format 'onnx' needs none"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' notes on packages and types that do not matter here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
