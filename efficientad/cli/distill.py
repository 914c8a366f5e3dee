"""The arguments and the run of `efficientad distill`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from efficientad.cli.common import UsageError, print_notes, progress_bars

_EPILOG = """\
The defaults are the paper's (Algorithm 3): 60,000 steps of 16 whole photos at a rate of 1e-4, which
want a GPU and many photos. For some thousand photos on a CPU, for instance:
  efficientad distill PHOTOS --backbone trunk.safetensors --out teacher.safetensors --steps 5000
    --batch-size 4 --crop 128 --bank 1 --lr 7e-4 --schedule cosine --warmup 200 --ema 0.998
The teacher's licence follows from the photos and the backbone; --license goes into its header.
"""


def add_distill(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser(
        "distill",
        help="make a teacher PDN from a backbone and photos",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add(
        "photos", nargs="+", help="photo files and folders of everyday things, thousands if you can"
    )
    add(
        "--backbone",
        type=Path,
        required=True,
        metavar="FILE",
        help="EfficientNet-Lite0 or Lite1, ResNet-18 trunk or WRN-101",
    )
    add("--out", type=Path, required=True, help="teacher file to write (.safetensors)")
    add("--size", choices=("S", "M"), default="S")
    add("--steps", type=int, default=60_000)
    add("--batch-size", type=int, default=16)
    add("--lr", type=float, default=1e-4, help="learning rate (default 1e-4)")
    add("--weight-decay", type=float, default=1e-5)
    add("--schedule", choices=("constant", "cosine"), default="constant")
    add("--warmup", type=int, default=0, metavar="STEPS", help="linear rise of the rate")
    add("--crop", type=int, metavar="PIXELS", help="train on windows (36..256, a multiple of 4)")
    add("--flip", action="store_true", help="mirror photos at random")
    add("--zoom", type=float, default=1.0, metavar="PART", help="show windows from PART of a photo")
    add("--grey", type=float, default=0.1, help="probability of a grey photo (default 0.1)")
    add("--ema", type=float, default=0.0, metavar="DECAY", help="deliver averaged weights (0: no)")
    add(
        "--bank",
        type=int,
        default=0,
        metavar="VIEWS",
        help="compute targets once, of VIEWS views "
        "a photo, and keep them on the disk (3 MB each); 0: at every step",
    )
    add("--bank-folder", type=Path, metavar="FOLDER", help="default: beside the state")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the PDN's convolutions; auto: bfloat16 where the device computes in it",
    )
    add("--held-out", type=int, default=48, metavar="PHOTOS", help="never trained on (default 48)")
    add("--every", type=int, default=500, metavar="STEPS", help="between held-out measurements")
    add("--seed", type=int, default=0)
    add("--state", type=Path, help="state of the run (default: OUT with suffix .state)")
    add("--resume", action="store_true", help="go on from the state, exactly")
    add("--force", action="store_true", help="replace an existing OUT or state")
    add("--license", metavar="TEXT", help="what the teacher's header says of its licence")
    add(
        "--sources",
        type=Path,
        metavar="FILE",
        help="JSON object on photos, backbone and their licences, for the teacher's header",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--workers", type=int, default=2, help="decoding threads")


def run_distill(options: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when some photos could not be read (they are listed).

    Raises ValueError, OSError or ImportError, whose text the command line prints.
    """
    from efficientad.checkpoint.teachers import DEFAULT_LICENSE
    from efficientad.data.image_files import find_images, left_out
    from efficientad.distillation.backbones import check_backbone, load_backbone
    from efficientad.distillation.distiller import Distillation
    from efficientad.distillation.recipe import Recipe
    from efficientad.utils.devices import choose_device, choose_dtype
    from efficientad.utils.files import path_digest
    from efficientad.utils.interrupts import held_back

    state = options.state or options.out.with_suffix(".state")
    _check_outputs(options, state)
    sources = _read_sources(options.sources)
    device = choose_device(options.device)
    options.dtype = choose_dtype(options.dtype, device)
    recipe = Recipe(
        **{
            name: getattr(options, name)
            for name in (
                "size steps batch_size lr weight_decay schedule warmup crop flip grey ema bank "
                "zoom dtype held_out seed"
            ).split()
        }
    )
    photos = find_images(options.photos)
    print_notes(left_out(options.photos))
    backbone = load_backbone(options.backbone).to(device)
    check_backbone(backbone, device)
    with progress_bars(lines=True) as bars, held_back(said=_say_stopping) as stop:
        run = Distillation(
            recipe,
            photos,
            backbone,
            backbone_facts={
                "name": options.backbone.name,
                "kind": type(backbone).__name__,
                "sha256": path_digest(options.backbone),
            },
            state=state,
            resume=options.resume,
            bank_folder=options.bank_folder,
            sources=sources,
            device=device,
            workers=options.workers,
            progress=bars,
        )
        run.run(
            options.out,
            every=options.every,
            license=options.license or DEFAULT_LICENSE,
            log=bars.log,
            stop=stop,
        )
    if run.step < recipe.steps:
        print(f"stopped at step {run.step}; go on with the same command and --resume")
    print(f"saved: {options.out} (PDN-{recipe.size}, step {run.step} of {recipe.steps})")
    for path, reason in run.data.failed.items():
        print(f"could not read {path}: {reason}", file=sys.stderr)
    return 1 if run.data.failed else 0


def _read_sources(path: Path | None) -> dict[str, Any] | None:
    """The JSON object of --sources; UsageError for anything else."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--sources {path} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise UsageError(f"--sources {path} holds a {type(found).__name__}; it must be an object")
    return found


def _say_stopping() -> None:
    print("stopping after this step ...", file=sys.stderr)


def _check_outputs(options: argparse.Namespace, state: Path) -> None:
    """Fail before hours of work, not after them."""
    from efficientad.utils.checks import check_integer, check_writable

    for name, path in (("--out", options.out), ("--state", state)):
        check_writable(name, path)
        if path.exists() and not (options.force or options.resume):
            raise UsageError(f"{path} exists; --resume goes on with it, --force replaces it")
    if state == options.out:
        raise UsageError(f"--state and --out are both {state}; they are two files")
    check_integer("--every", options.every, 1)
    check_integer("--workers", options.workers, 0)
