"""The command `efficientad serve`."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from efficientad.cli.common import (
    EXIT_OK,
    UsageError,
    build_predictor,
    load_detector,
    require_calibration,
    require_packages,
)
from efficientad.cli.sinks import add_sinks, sinks_of

if TYPE_CHECKING:
    from efficientad.service.core import Model
    from efficientad.service.server import Settings

KEY = "EFFICIENTAD_API_KEY"  # environment variable
HOST, PORT = "127.0.0.1", 8000  # unless said otherwise
PACKAGES = ("fastapi", "uvicorn", "python_multipart", "prometheus_client")
POSTGRES = ("psycopg", "psycopg_pool")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def add_serve(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser(
        "serve",
        help="judge pictures over HTTP, keep the verdicts, show them on a page",
        epilog=f"The API key is read from the environment variable {KEY}, or from --key-file.",
    )
    command.add_argument(
        "models", nargs="+", metavar="MODEL", help="detector file, or NAME=FILE (default: its name)"
    )
    add_service(command)


def add_service(command: argparse.ArgumentParser) -> None:
    """Add the options of a service, which `settings_of` and `models_of` read."""
    command.add_argument("--host", default=HOST, help=f"address (default {HOST})")
    command.add_argument("--port", type=int, default=PORT, help=f"default {PORT}; 0: a free one")
    command.add_argument(
        "--store", type=Path, default=Path("verdicts"), help="folder of the verdicts"
    )
    command.add_argument(
        "--database",
        metavar="URL",
        help="keep the verdicts in PostgreSQL, and only pictures in the folder: postgresql://"
        "user@host/name, with the password in ~/.pgpass or PGPASSWORD",
    )
    command.add_argument("--key-file", type=Path, metavar="FILE", help="file with the API key")
    command.add_argument(
        "--without-key", action="store_true", help="let everybody ask who reaches the address"
    )
    command.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="without a key: a name beside localhost by which this machine may be asked",
    )
    command.add_argument("--keep-days", type=float, metavar="DAYS", help="delete older verdicts")
    command.add_argument(
        "--keep-gb", type=float, metavar="GB", help="delete the oldest verdicts beyond this size"
    )
    command.add_argument(
        "--no-fsync",
        action="store_true",
        help="do not wait for the disk: faster, and a power cut may lose the last verdicts",
    )
    command.add_argument(
        "--min-area",
        type=float,
        default=0,
        metavar="PIXELS",
        help="leave out defects of fewer pixels of the picture",
    )
    add_sinks(command)
    _add_limits(command)
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    command.add_argument("--dtype", default="auto", help="as for predict")
    command.add_argument("--batch-size", type=int, help="pictures in one step at most")
    command.add_argument(
        "--wait-ms",
        type=float,
        default=2.0,
        metavar="MS",
        help="that a picture waits for others to share its batch (default 2)",
    )


def _add_limits(command: argparse.ArgumentParser) -> None:
    """One option for each of `service.limits.Limits`."""
    for option, kind, value, text in (
        ("--max-body-mb", float, 64, "largest body of a request"),
        ("--body-seconds", float, 30, "time in which a body must come"),
        ("--max-megapixels", float, 64, "largest picture"),
        ("--decode-seconds", float, 20, "longest time to decode a picture"),
        ("--queue", int, 64, "pictures that wait for each model"),
        ("--memory-gb", float, 2, "bodies and decoded pictures held at once"),
    ):
        command.add_argument(
            option, type=kind, default=value, metavar="N", help=f"{text} (default {value})"
        )


def run_serve(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    require_extra()
    from efficientad.service.server import run

    settings, sinks = settings_of(options), sinks_of(options)
    run(models_of(options.models, options), settings, sinks=sinks)
    return EXIT_OK


def settings_of(options: argparse.Namespace) -> Settings:
    """How the options of `add_service` let a service run. UsageError, ValueError: a wrong one."""
    if options.database is not None:
        require_packages("postgres", POSTGRES)
    from efficientad.service.limits import Limits
    from efficientad.service.server import Settings

    limits = Limits(
        body_mb=options.max_body_mb,
        body_seconds=options.body_seconds,
        megapixels=options.max_megapixels,
        decode_seconds=options.decode_seconds,
        queue=options.queue,
        memory_gb=options.memory_gb,
    )
    if not 0 <= options.port < 65536:
        raise UsageError(f"--port is {options.port}; it must be in 0..65535")
    return Settings(
        store=options.store,
        host=options.host,
        port=options.port,
        key=_key(options),
        hosts=("*",) if options.without_key else tuple(options.allow_host),
        limits=limits,
        wait_ms=options.wait_ms,
        min_area=options.min_area,
        durable=not options.no_fsync,
        database=options.database,
        keep_days=options.keep_days,
        keep_gb=options.keep_gb,
    )


def models_of(words: list[str], options: argparse.Namespace) -> dict[str, Model]:
    """Name -> what is served of detectors, named as on the command line."""
    from efficientad.model.trust import calibration_of
    from efficientad.service.core import Model
    from efficientad.utils.files import path_digest

    models = {}
    for name, path in _paths(words).items():
        detector = load_detector(path, "cpu")
        require_calibration(detector)
        if detector.threshold is None:
            print(f"{name} has no threshold: its pictures get scores and no verdicts")
        models[name] = Model(
            path_digest(path),
            build_predictor(detector, options),
            calibration_of(detector.provenance),
        )
    return models


def serve_model(model: Path, store: Path) -> int:
    """`efficientad serve MODEL --store STORE` and nothing else said."""
    parser = argparse.ArgumentParser()
    add_serve(parser.add_subparsers())
    return run_serve(parser.parse_args(["serve", str(model), "--store", str(store)]))


def require_extra() -> None:
    """Raise ImportError, with the pip line, unless the service's packages are there."""
    require_packages("serve", PACKAGES)


def require_port() -> None:
    """Raise OSError unless a service can listen where it does by default."""
    from efficientad.service.server import bound_socket

    bound_socket(HOST, PORT).close()


def _key(options: argparse.Namespace) -> str | None:
    """The API key, from a file or the environment; None for none."""
    key = os.environ.get(KEY) or None
    if options.key_file is not None:
        if key is not None:
            raise UsageError(f"--key-file is given, and {KEY} is set; leave one out")
        key = options.key_file.read_text(encoding="utf-8").strip()
        if not key:
            raise UsageError(f"--key-file is {options.key_file}, which is empty")
    if key is not None and options.without_key:
        raise UsageError("--without-key contradicts the API key that is given; leave one out")
    return key


def _paths(words: list[str]) -> dict[str, str]:
    """Name -> path of the detectors to serve."""
    models: dict[str, str] = {}
    for word in words:
        name, equals, path = word.partition("=")
        if not equals or os.path.exists(word):
            name, path = Path(word).stem, word
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"MODEL is {word!r}, and {name!r} is no name: letters, digits, . _ - and at most "
                "64 of them; give one as NAME=FILE"
            )
        if name in models:
            raise UsageError(f"two models are called {name!r}; name them with NAME=FILE")
        models[name] = path
    return models
