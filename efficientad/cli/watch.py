"""The command `efficientad watch`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from efficientad.cli.common import EXIT_OK, UsageError, require_packages
from efficientad.cli.serve import add_service, models_of, require_extra, settings_of
from efficientad.cli.sinks import sinks_of

if TYPE_CHECKING:
    from efficientad.service.server import Source


def add_watch(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser(
        "watch",
        help="judge what comes into a folder or from a camera, and serve the page",
        epilog="All else is as in `efficientad serve`.",
    )
    command.add_argument("source", help="folder; with --camera its number, address or video file")
    command.add_argument("model", metavar="MODEL", help="detector file, or NAME=FILE")
    command.add_argument("--camera", action="store_true", help="SOURCE is a camera")
    command.add_argument(
        "--every", type=float, metavar="S", help="a frame every S seconds; 0: each (default 1)"
    )
    command.add_argument(
        "--settle",
        type=float,
        metavar="S",
        help="a file is complete when it has not changed for S seconds (default 0.5)",
    )
    add_service(command)


def run_watch(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    source = _source(options)
    from efficientad.service.server import run

    settings, sinks = settings_of(options), sinks_of(options)
    run(models_of([options.model], options), settings, source, sinks)
    return EXIT_OK


def _source(options: argparse.Namespace) -> Source:
    """The folder or the camera that the options name."""
    require_extra()
    if options.camera:
        if options.settle is not None:
            raise UsageError("--settle is of a folder; leave it or --camera out")
        from efficientad.sources.camera import Camera

        return Camera(options.source, every=1.0 if options.every is None else options.every)
    if options.every is not None:
        raise UsageError("--every is of a camera; leave it out, or add --camera")
    require_packages("watch", ["watchfiles"])
    from efficientad.sources.folder import WatchedFolder

    return WatchedFolder(options.source, settle=0.5 if options.settle is None else options.settle)
