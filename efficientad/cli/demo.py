"""The command `efficientad demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from efficientad.cli.common import EXIT_OK, print_metrics, progress_bars
from efficientad.cli.serve import HOST, PORT, require_extra, require_port, serve_model


def add_demo(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser("demo", help="draw parts, make a detector, find the defects")
    command.add_argument("--out", type=Path, default=Path("efficientad-demo"))
    command.add_argument("--seed", type=int, default=0)
    command.add_argument(
        "--serve", action="store_true", help="then serve the detector, with its page"
    )


def run_demo(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from efficientad.demo.walkthrough import run

    if options.serve:
        require_extra()  # not after minutes of training
        require_port()
    with progress_bars() as progress:
        result = run(options.out, seed=options.seed, progress=progress)
    print_metrics(result.metrics)
    print(f"report: {options.out / 'report' / 'report.html'}")
    if options.serve:
        picture = options.out / "parts" / "test" / "stain" / "000.png"
        print(
            f"send a part: curl --data-binary @{picture} http://{HOST}:{PORT}/predict", flush=True
        )
        return serve_model(options.out / "detector.safetensors", options.out / "verdicts")
    return EXIT_OK
