"""`efficientad archive` beside `efficientad predict` on the same machine, on the same pictures.

    python -m bench.archive.throughput --pictures 2000 --json bench/results/archive_cpu.json

Both run as commands, each once for one picture and once for all of them: the first time is what a
start costs, the difference gives the rate. `predict` writes neither maps nor overlays here; its
report and its regions it does write. The scores of both must be the same. Exit code 1 if not.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from bench import record
from bench.predictor.soak import judged_detector
from efficientad.checkpoint.native_file import save
from efficientad.model.synthetic import frames

KINDS = 32  # different pictures


def draw(folder: Path, pictures: int) -> list[str]:
    """JPEGs of 256x256 by links to a few; returns their names."""
    folder.mkdir()
    kinds = frames(min(KINDS, pictures))
    for i, frame in enumerate(kinds):
        Image.fromarray(frame).save(folder / f"{i:07}.jpg", quality=90)
    for i in range(len(kinds), pictures):
        (folder / f"{i:07}.jpg").hardlink_to(folder / f"{i % len(kinds):07}.jpg")
    return [f"{i:07}.jpg" for i in range(pictures)]


def seconds_of(*words: object) -> float:
    """How long a command of the package takes. RuntimeError where it fails."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "efficientad", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    return time.perf_counter() - start


def measure(options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Both commands on a drawn folder; what they took, and what was wrong."""
    from pyarrow import dataset

    model = root / "model.safetensors"
    save(judged_detector(), model)
    words = [
        "--device",
        options.device,
        *(("--dtype", "float32") if options.device == "cpu" else ()),
    ]
    many = ["--workers", options.workers] if options.workers else []
    many += ["--scorers", options.scorers] if options.scorers else []
    took: dict[str, list[float]] = {"predict": [], "archive": []}
    for pictures in (1, options.pictures):
        folder, table = root / f"pictures-{pictures}", root / f"{pictures}.csv"
        names = draw(folder, pictures)
        with open(table, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["path"], *([f"{folder.name}/{name}"] for name in names)])
        plain, rows = root / f"predicted-{pictures}", root / f"archived-{pictures}"
        none = ["--no-maps", "--no-overlays"]
        took["predict"].append(seconds_of("predict", model, folder, "--out", plain, *none, *words))
        took["archive"].append(seconds_of("archive", table, model, "--out", rows, *words, *many))
    document = json.loads((plain / "scores.json").read_text(encoding="utf-8"))
    expected = {Path(row["path"]).name: row["score"] for row in document["images"]}
    found = dataset.dataset(rows / "rows").to_table(columns=["path", "score"]).to_pylist()
    scores = {Path(row["path"]).name: row["score"] for row in found}
    worst = max((abs(scores.get(n, math.inf) - s) for n, s in expected.items()), default=math.inf)
    problems = []
    if len(found) != len(scores) or scores.keys() != expected.keys():
        problems.append(f"{len(found)} rows of {len(scores)} pictures, {len(expected)} predicted")
    if worst > 0:
        problems.append(f"scores differ by up to {worst:g}")
    return {
        "pictures": options.pictures,
        "device": options.device,
        **{
            name: {
                "start_seconds": round(one, 2),
                "seconds": round(whole, 2),
                "pictures_per_second": round((options.pictures - 1) / (whole - one), 2)
                if whole > one
                else None,
            }
            for name, (one, whole) in took.items()
        },
        "problems": problems,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--workers", type=int, help="as of `efficientad archive`")
    parser.add_argument("--scorers", type=int, help="as of `efficientad archive`")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    if options.pictures < 2:
        parser.error(f"--pictures is {options.pictures}; it must be 2 or more")
    with tempfile.TemporaryDirectory() as name:
        result = measure(options, Path(name))
    print(json.dumps(result, indent=1))
    if options.json is not None:
        record.write(options.json, record.about(options.device), [{"kind": "archive", **result}])
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
