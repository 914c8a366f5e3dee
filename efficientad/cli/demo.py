"""The command `efficientad demo`."""

from __future__ import annotations

import argparse
from pathlib import Path

from efficientad.cli.common import EXIT_OK, print_metrics, progress_bars


def add_demo(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser("demo", help="draw parts, make a detector, find the defects")
    command.add_argument("--out", type=Path, default=Path("efficientad-demo"))
    command.add_argument("--seed", type=int, default=0)


def run_demo(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from efficientad.demo.walkthrough import run

    with progress_bars() as progress:
        result = run(options.out, seed=options.seed, progress=progress)
    print_metrics(result.metrics)
    print(f"report: {options.out / 'report' / 'report.html'}")
    return EXIT_OK
