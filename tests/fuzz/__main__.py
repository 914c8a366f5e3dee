"""The whole fuzzing, or a part of it.

    python -m tests.fuzz                                   # everything: hours
    python -m tests.fuzz pictures tables                   # 10,000 pictures, 2,000 tables
    python -m tests.fuzz checkpoints --count 500 --seed 1  # other inputs
    python -m tests.fuzz pictures --first 1234 --count 1   # one input again

Prints what became of the inputs, and every finding. Exit code 1 if there is one.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
import tempfile
from pathlib import Path

COUNTS = {"pictures": 10_000, "checkpoints": 10_000, "tables": 2_000, "kills": 500}


def main() -> int:
    """Fuzz what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=", ".join(COUNTS))
    parser.add_argument("--count", type=int, help="inputs of each kind")
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kinds = options.kinds or list(COUNTS)
    if unknown := set(kinds) - set(COUNTS):
        parser.error(f"{', '.join(sorted(unknown))}: it must be of {', '.join(COUNTS)}")
    here = Path(__file__).resolve().parent
    sys.path[:0] = [str(here), str(here.parent)]
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)
    os.environ.pop("EFFICIENTAD_MAX_MEGAPIXELS", None)
    findings = 0
    for kind in kinds:
        run = importlib.import_module(f"fuzz_{kind}").run
        with tempfile.TemporaryDirectory() as folder:
            outcome = run(options.count or COUNTS[kind], options.seed, Path(folder), options.first)
        print(f"{kind}: {outcome}", flush=True)
        for finding in outcome.findings:
            print(f"  {finding}")
        findings += len(outcome.findings)
    return int(findings > 0)


if __name__ == "__main__":
    sys.exit(main())
