"""The service that `bench.service.load` starts and kills, as a process of its own.

    python -m bench.service.serving --store DIR --port 8100 --network stub

It serves EfficientAD-S with random weights, or the predictor with its network replaced by a light
stub, under the name "load".
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.predictor.soak import StubPredictor, judged_detector
from efficientad.fast.predictor import FastPredictor
from efficientad.service.core import Model
from efficientad.service.server import Settings, run


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--network", choices=("stub", "real"), default="stub")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-fsync", action="store_true")
    options = parser.parse_args()
    kind = StubPredictor if options.network == "stub" else FastPredictor
    dtype = "float32" if options.device == "cpu" else "auto"
    predictor = kind(judged_detector(), device=options.device, dtype=dtype)
    settings = Settings(options.store, port=options.port, durable=not options.no_fsync)
    run({"load": Model("random weights", predictor)}, settings)


if __name__ == "__main__":
    main()
