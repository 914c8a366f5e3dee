"""The commands `convert`, `export`, `bundle` and `info`: a model as a file, and what is there."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from efficientad import __version__
from efficientad.cli.common import EXIT_OK, refuse_overwrite

FORMATS = ("onnx", "aoti")  # of `exporting.FORMATS`, without importing torch for the help
BUNDLE_DTYPES = ("float16", "bfloat16", "float8_e4m3fn")  # of `building.DTYPES`, likewise
_LONG = 12  # values in a list that `info` still prints


def add_convert(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser("convert", help="turn another project's checkpoint into ours")
    command.add_argument("source", help=".ckpt, .pt, .pth, or a training's folder")
    command.add_argument("out", type=Path, help="the detector file to write (.safetensors)")
    command.add_argument("--force", action="store_true", help="replace an existing file")
    command.add_argument(
        "--double-normalization",
        choices=("yes", "no"),
        help="whether an anomalib 1.0.x checkpoint was trained on images normalised twice",
    )


def run_convert(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from efficientad.checkpoint.loading import convert
    from efficientad.checkpoint.native_file import save

    refuse_overwrite(options.out, options.force)
    double = {None: None, "yes": True, "no": False}[options.double_normalization]
    detector = convert(options.source, double_normalization=double)
    save(detector, options.out)
    print(f"saved: {options.out}")
    if not detector.calibrated:
        print(f"not calibrated: run `efficientad calibrate {options.out} GOOD_IMAGES`")
    return EXIT_OK


def add_export(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser(
        "export", help="write an ONNX or AOTInductor file, compared with the detector"
    )
    command.add_argument("model", help="detector file, or another project's checkpoint")
    command.add_argument("out", type=Path, help="the file to write (.onnx or .pt2)")
    command.add_argument("--format", choices=FORMATS, help="default: by the name of OUT")
    command.add_argument(
        "--image-size",
        type=int,
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="fixed in the file; default: the detector's",
    )
    command.add_argument("--device", default="cpu", help="aoti: what to compile for, cpu or cuda")
    command.add_argument("--no-verify", action="store_true", help="do not run and compare the file")
    command.add_argument("--force", action="store_true", help="replace an existing file")


def run_export(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from efficientad.checkpoint.exporting import BOUND, FORMATS, export
    from efficientad.checkpoint.loading import load
    from efficientad.utils.devices import choose_device

    by_suffix = {suffix: name for name, suffix in FORMATS.items()}
    format = options.format or by_suffix.get(options.out.suffix)
    if format is None:
        raise ValueError(
            f"OUT is {options.out.name!r}; its name must end in {' or '.join(by_suffix)}"
        )
    device = choose_device(options.device)
    result = export(
        load(options.model).to(device),
        options.out,
        format,
        image_size=None if options.image_size is None else tuple(options.image_size),
        verify=not options.no_verify,
        force=options.force,
    )
    for count, difference in result.differences.items():
        print(
            f"batch {count}: differs from the detector by {difference:.2g} of the maps' scale "
            f"(bound {BOUND:g})"
        )
    if not result.differences:
        print("not compared with the detector (--no-verify)")
    print(f"saved: {result.path} ({result.bytes / 1e6:.1f} MB)")
    return EXIT_OK


def add_bundle(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser(
        "bundle",
        help="compile the kernels of a GPU, which need not be here, into a file",
        description="Compile the kernels with which a GPU runs a detector into a file, on any "
        "machine with Triton. EFFICIENTAD_BUNDLE=FILE, or FastPredictor(bundle=FILE), then needs "
        "no compiler. The file serves every detector of the same shape.",
    )
    command.add_argument("model", help="detector file, or another project's checkpoint")
    command.add_argument("out", type=Path, help="the file to write, such as screw.sm_90.kernels")
    command.add_argument("--arch", required=True, help="of the GPU, such as sm_90")
    command.add_argument("--dtype", choices=BUNDLE_DTYPES, default=BUNDLE_DTYPES[0])
    command.add_argument(
        "--batch-sizes", type=int, nargs="+", metavar="N", help="default: FastPredictor's, 1 4 16"
    )
    command.add_argument(
        "--fp8-layers", choices=("second", "inner", "all"), default="second", help="of fp8"
    )
    command.add_argument("--force", action="store_true", help="replace an existing file")


def run_bundle(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from efficientad.aot.building import build_bundle
    from efficientad.checkpoint.loading import load

    refuse_overwrite(options.out, options.force)
    bundle = build_bundle(
        load(options.model),
        options.out,
        options.arch,
        dtype=options.dtype,
        batch_sizes=options.batch_sizes,
        fp8_layers=options.fp8_layers,
    )
    print(f"saved: {options.out} ({bundle.facts()['kernels']})")
    return EXIT_OK


def add_info(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser("info", help="what is installed, or what is in a file")
    command.add_argument("model", nargs="?", help="detector file or kernel bundle")
    command.add_argument("--json", action="store_true")


def run_info(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    facts: dict[str, Any] = environment() if options.model is None else describe(options.model)
    if options.json:
        print(json.dumps(facts, indent=1, default=str))
        return EXIT_OK
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        print(f"{key:<{width}}  {_shortened(value)}")
    return EXIT_OK


def _shortened(value: Any) -> Any:
    """With long lists inside as their length, for reading; --json has all of it."""
    if isinstance(value, dict):
        return {key: _shortened(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return f"{len(value)} values" if len(value) > _LONG else [_shortened(v) for v in value]
    return value


def describe(path: str) -> dict[str, Any]:
    """What is in a detector file or a kernel bundle."""
    from efficientad.checkpoint.loading import load
    from efficientad.model.image_score import described
    from efficientad.model.region import share
    from efficientad.ops.kernel_bundle import is_bundle

    if is_bundle(path):
        return {"file": path, **bundle_facts(path)}
    detector = load(path)
    facts: dict[str, Any] = {
        "file": path,
        "size": f"EfficientAD-{detector.size}",
        "padding": detector.padding,
        "image size": "x".join(map(str, detector.image_size)),
        "border rule": f"{detector.border}, {detector.map_padding} cells",
        "score": f"{described(detector.score)}, at {detector.score_size} size",
        "global term": "none" if detector.global_term is None else "set",
        "statistics": "set" if detector.has_statistics else "not set",
        "quantiles": [round(q, 6) for q in detector.quantiles.tolist()]
        if detector.calibrated
        else "not set",
        "autoencoder's weight": detector.autoencoder_weight,
        "value range": detector.value_range or "of the type of its samples",
        "region": "the whole frame"
        if detector.region is None
        else f"{100 * share(detector.region):.1f} % of the frame",
        "threshold": detector.threshold if detector.threshold is not None else "not set",
    }
    if detector.calibrated:
        from efficientad.fast.predictor import FastPredictor

        fast = FastPredictor(detector, batch_sizes=(1,)).facts
        facts["fast path"] = f"{fast['backend']}, {fast['dtype']}, {fast['device']}"
        facts["precision"] = fast["precision"]
        if fast["bundle"]:
            facts["kernel bundle"] = fast["bundle"]
        if fast["reason"]:
            facts["kernels not used"] = fast["reason"]
    for key, value in detector.provenance.items():
        facts[f"provenance: {key}"] = value
    return facts


def bundle_facts(path: str) -> dict[str, Any]:
    """What is in a kernel bundle, and whether it serves here."""
    import torch

    from efficientad.ops.kernel_bundle import read_bundle

    bundle = read_bundle(path)
    arch, yes = bundle.arch, f"with a GPU of sm_{bundle.arch}, and there is none"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        arch, yes = 10 * major + minor, "yes"
    return {**bundle.facts(), "usable here": bundle.unfit(arch) or yes}


def environment() -> dict[str, Any]:
    """What is installed and what the package would run on."""
    import torch

    from efficientad.checkpoint.teachers import default_teacher_facts
    from efficientad.fast.backends import KernelBackend
    from efficientad.fast.folded_network import network_name
    from efficientad.fast.options import BUNDLE, choose_dtype
    from efficientad.ops import native
    from efficientad.ops.fused import choose_backend
    from efficientad.ops.kernel_bundle import BundleError

    facts: dict[str, Any] = {"efficientad": __version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy", "safetensors", "pillow", "scipy"):
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        facts["device"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    else:
        facts["device"] = f"cpu, {torch.get_num_threads()} threads"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype("auto", device, "auto")
    kernels = choose_backend(device) == "triton"
    chosen = KernelBackend.name if kernels else network_name(dtype, device)
    facts["fast path"] = f"{chosen}, {str(dtype).removeprefix('torch.')}"
    if bundle := os.environ.get(BUNDLE):
        try:
            facts["kernel bundle"] = {"file": bundle, **bundle_facts(bundle)}
        except (FileNotFoundError, BundleError) as error:
            facts["kernel bundle"] = f"not usable: {error}"
    try:
        facts["default teacher"] = default_teacher_facts()["license"]
    except FileNotFoundError:
        facts["default teacher"] = "not there; `train` needs --teacher"
    frames = native.info()
    facts["frame path"] = (
        f"compiled, {frames['level']}, {frames['threads']} threads; CUDA code for "
        f"{', '.join(f'sm_{n}' for n in frames['cuda']) or 'no device'}"
        if frames["available"]
        else f"torch: {frames['reason']}"
    )
    return facts
