"""The command `efficientad export`."""

from __future__ import annotations

import argparse
from pathlib import Path

FORMATS = ("onnx", "aoti")  # of `exporting.FORMATS`, without importing torch for the help


def add_export(commands: argparse._SubParsersAction) -> None:
    """Add the command's arguments."""
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
    return 0
