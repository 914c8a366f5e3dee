"""The command line: the list of commands, and what runs one.

Exit codes: 0 ran; 1 ran, but some inputs failed (they are listed); 2 wrong usage or an unusable
model or data set; 3 with --fail-on-anomaly, an image was judged anomalous, or with
--fail-on-drift scores have drifted; 130 stopped by Ctrl-C or SIGTERM.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from efficientad import __version__
from efficientad.cli.archive import add_archive, run_archive
from efficientad.cli.benchmark import add_benchmark, run_benchmark
from efficientad.cli.common import EXIT_STOPPED, EXIT_USAGE
from efficientad.cli.demo import add_demo, run_demo
from efficientad.cli.distill import add_distill, run_distill
from efficientad.cli.evaluate import add_calibrate, add_evaluate, run_calibrate, run_evaluate
from efficientad.cli.model_files import (
    add_bundle,
    add_convert,
    add_export,
    add_info,
    run_bundle,
    run_convert,
    run_export,
    run_info,
)
from efficientad.cli.predict import add_predict, run_predict
from efficientad.cli.scores import add_drift, add_judge, run_drift, run_judge
from efficientad.cli.serve import add_serve, run_serve
from efficientad.cli.train import add_train, run_train
from efficientad.cli.watch import add_watch, run_watch
from efficientad.utils.interrupts import terminated_like_interrupted

Add = Callable[[argparse._SubParsersAction], None]
Run = Callable[[argparse.Namespace], int]

COMMANDS: dict[str, tuple[Add, Run]] = {  # in the order of the help
    "train": (add_train, run_train),
    "predict": (add_predict, run_predict),
    "archive": (add_archive, run_archive),
    "serve": (add_serve, run_serve),
    "watch": (add_watch, run_watch),
    "evaluate": (add_evaluate, run_evaluate),
    "calibrate": (add_calibrate, run_calibrate),
    "judge": (add_judge, run_judge),
    "drift": (add_drift, run_drift),
    "convert": (add_convert, run_convert),
    "export": (add_export, run_export),
    "bundle": (add_bundle, run_bundle),
    "distill": (add_distill, run_distill),
    "benchmark": (add_benchmark, run_benchmark),
    "info": (add_info, run_info),
    "demo": (add_demo, run_demo),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = build_parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return EXIT_USAGE
    _, run = COMMANDS[options.command]
    try:
        with terminated_like_interrupted(), _warnings_as_sentences():
            return run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"efficientad {options.command}: error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt as stop:
        print(f"efficientad {options.command}: {str(stop) or 'stopped'}", file=sys.stderr)
        return EXIT_STOPPED


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """Warnings for users as one line each, and each of them once; none for programmers."""
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
        text = " ".join(str(message).split())
        if issubclass(category, UserWarning) and text not in said:
            said.add(text)
            print(f"warning: {text}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def build_parser() -> argparse.ArgumentParser:
    """Parser of all commands, in the order of `COMMANDS`."""
    parser = argparse.ArgumentParser(
        prog="efficientad",
        description="EfficientAD anomaly detection: point it at images, get scores and heat maps.",
        epilog="exit codes: 0 ran, 1 some inputs failed (listed), 2 wrong usage, "
        "3 anomalies found (with --fail-on-anomaly) or drift (with --fail-on-drift)",
    )
    parser.add_argument("--version", action="version", version=f"efficientad {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for add, _ in COMMANDS.values():
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
