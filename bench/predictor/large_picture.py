"""Peak memory of `efficientad predict` on one very large picture.

    python -m bench.predictor.large_picture                       # 150 megapixels, every kind
    python -m bench.predictor.large_picture --megapixels 20 --kinds JPEG PNG

The picture is drawn, the detector has random weights. Each run is a process of its own, with maps,
overlay and report, and its peak of resident memory comes from the system. The bytes a pixel are
what a run takes beyond a run on a picture of 256x256, which is the interpreter, torch and the
network. Exit code 1 if one takes 12 or more.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bench import record
from efficientad.checkpoint.native_file import save
from efficientad.model.synthetic import random_detector

MOST = 12  # bytes a pixel
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "JPEG": ("jpg", "RGB", {"quality": 90}),
    "JPEG, progressive": ("jpg", "RGB", {"quality": 90, "progressive": True}),
    "PNG": ("png", "RGB", {"compress_level": 1}),
    "TIFF": ("tif", "RGB", {}),
    "TIFF, LZW": ("tif", "RGB", {"compression": "tiff_lzw"}),
    "PNG, grey of 16 bits": ("png", "I;16", {"compress_level": 1}),
    "TIFF, grey of 16 bits": ("tif", "I;16", {}),
}


def draw(path: Path, kind: str, megapixels: float) -> tuple[int, int]:
    """Write a picture three times as wide as high; returns (width, height)."""
    _, mode, options = KINDS[kind]
    height = round((megapixels * 1e6 / 3) ** 0.5)
    size = 3 * height, height
    rng = np.random.default_rng(0)
    tile = rng.integers(60, 160, (1024, 1024, 3), dtype=np.uint8)
    tile[::128] = 220
    patch = Image.fromarray(tile)
    if mode == "I;16":
        patch = Image.fromarray(tile[..., 0].astype(np.uint16) * 257)
    picture = Image.new(mode, size)
    for top in range(0, size[1], 1024):
        for left in range(0, size[0], 1024):
            picture.paste(patch, (left, top))
    picture.save(path, **options)
    return size


def peak_of_predict(model: Path, picture: Path, options: list[str]) -> int:
    """Bytes of resident memory at most, of `efficientad predict` in a process of its own."""
    command = [sys.executable, "-m", "efficientad", "predict", str(model), str(picture), *options]
    with tempfile.TemporaryDirectory() as out:
        process = subprocess.Popen([*command, "--out", out], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(kinds: list[str], megapixels: float, options: list[str]) -> list[record.Row]:
    """A row per kind of file."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        model, small = Path(folder, "detector.safetensors"), Path(folder, "small.png")
        detector = random_detector()
        detector.threshold = 0.1
        save(detector, model)
        Image.fromarray(np.full((256, 256, 3), 90, np.uint8)).save(small)
        base = peak_of_predict(model, small, options)
        for kind in kinds:
            picture = Path(folder, f"picture.{KINDS[kind][0]}")
            width, height = draw(picture, kind, megapixels)
            peak = peak_of_predict(model, picture, options)
            row = {
                "kind": kind,
                "width": width,
                "height": height,
                "file_bytes": picture.stat().st_size,
                "peak_bytes": peak,
                "base_bytes": base,
                "bytes_a_pixel": (peak - base) / (width * height),
            }
            rows.append(row)
            print(
                f"{kind}: {width}x{height}, peak {peak / 1e6:.0f} MB, of which {base / 1e6:.0f} "
                f"without it: {row['bytes_a_pixel']:.2f} bytes a pixel",
                flush=True,
            )
            picture.unlink()
    return rows


def main() -> int:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--megapixels", type=float, default=150)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("options", nargs="*", help="of predict, after --")
    arguments = parser.parse_args()
    rows = measure(arguments.kinds, arguments.megapixels, arguments.options)
    if arguments.json is not None:
        record.write(arguments.json, record.about(), rows)
    return int(any(row["bytes_a_pixel"] >= MOST for row in rows))


if __name__ == "__main__":
    sys.exit(main())
