"""A long run of mixed frames through the predictor's stream.

    python -m bench.predictor.soak --frames 100000     # the network replaced by a light stub
    python -m bench.predictor.soak --frames 2000 --network real   # EfficientAD-S, random weights

Frames come as arrays, tensors, PIL images, encoded bytes and files, of several sizes and depths;
one in a hundred is damaged. Every good frame must be answered once, in order, with the score it has
alone; every damaged one must be reported by its index; and the process must not grow: resident
memory at the end is compared with that after the first tenth. Exit code 1 if any of this fails.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from bench import record
from efficientad.fast.backends import TorchBackend
from efficientad.fast.predictor import FastPredictor
from efficientad.model.agreement import BOUNDS
from efficientad.model.detector import EfficientAD
from efficientad.model.synthetic import random_detector

GROWTH = 0.02  # of resident memory, from the first tenth to the end
DAMAGED = 0.01  # share of frames


class StubBackend(TorchBackend):
    """Maps of the network's shape for the cost of a pooling."""

    def distance_maps(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        pooled = F.avg_pool2d(packed.permute(0, 3, 1, 2).float().abs(), 4)
        maps = pooled[:, :, 4:-4, 4:-4]
        return maps[:, 0].contiguous(), maps[:, 1].contiguous()


class StubPredictor(FastPredictor):
    """The predictor on `StubBackend`."""

    torch_backend = StubBackend


def judged_detector() -> EfficientAD:
    """EfficientAD-S with random weights and a threshold: the pipeline is tested, not it."""
    detector = random_detector()
    detector.threshold = 0.5
    return detector


def good_sources(folder: Path) -> list[Any]:
    """Frames of every kind that the predictor takes."""
    generator = np.random.default_rng(0)
    sources: list[Any] = []
    for i, (height, width) in enumerate(((256, 256), (256, 256), (256, 256), (300, 400))):
        coarse = Image.fromarray(generator.integers(0, 256, (9, 11, 3), np.uint8))
        frame = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        files = {kind: io.BytesIO() for kind in ("PNG", "JPEG")}
        for kind, file in files.items():
            Image.fromarray(frame).save(file, kind)
        path = folder / f"{i}.png"
        path.write_bytes(files["PNG"].getvalue())
        sources += [
            frame,
            torch.from_numpy(frame.copy()),
            Image.fromarray(frame),
            files["PNG"].getvalue(),
            files["JPEG"].getvalue(),
            path,
            str(path),
            frame[..., 0].copy(),
            frame.astype(np.uint16) * 257,
            np.dstack([frame, frame[..., :1]]),
            np.pad(frame, ((0, 0), (0, 7), (0, 0)))[:, :width],
        ]
    return sources


def damaged_sources(good: list[Any], folder: Path) -> list[Any]:
    """Frames that cannot be read."""
    encoded = next(s for s in good if isinstance(s, bytes))
    cut = folder / "cut.png"
    cut.write_bytes(encoded[: len(encoded) // 2])
    floats = np.zeros((256, 256, 3), np.float32)
    return [encoded[: len(encoded) // 2], b"", cut, folder / "missing.png", floats, 7]


def resident_bytes() -> int:
    """Resident memory of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def soak(frames: int, network: str, device: str, workers: int) -> dict[str, Any]:
    """Run it; returns what was counted and what was wrong, see the module's text."""
    kind = StubPredictor if network == "stub" else FastPredictor
    dtype = "float32" if device == "cpu" else "auto"
    predictor = kind(judged_detector(), device=device, dtype=dtype)
    problems: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        good = good_sources(Path(name))
        bad = damaged_sources(good, Path(name))
        bound = BOUNDS[predictor.dtype][0]  # alone it may be in another bucket
        alone = [float(predictor(source).score) for source in good]
        choice = np.random.Generator(np.random.Philox(1)).random(frames)
        which = np.random.Generator(np.random.Philox(2)).integers(0, 2**31, frames)
        is_bad = choice < DAMAGED

        def source(i: int) -> Any:
            return bad[which[i] % len(bad)] if is_bad[i] else good[which[i] % len(good)]

        reported: list[int] = []
        answered = first = 0
        expected: Iterator[int] = iter(np.flatnonzero(~is_bad).tolist())
        start = time.perf_counter()
        for prediction in predictor.stream(
            (source(i) for i in range(frames)),
            workers=workers,
            on_error=lambda index, source, error: reported.append(index),
        ):
            index = next(expected, None)
            if prediction.index != index and len(problems) < 9:
                problems.append(f"frame {index} expected, {prediction.index} answered")
            score = prediction.cpu().score
            if abs(score - alone[which[prediction.index] % len(good)]) > bound * max(1, abs(score)):
                problems.append(f"frame {prediction.index} has score {score}, alone another")
            answered += 1
            if answered == frames // 10:
                first = resident_bytes()
        seconds, last = time.perf_counter() - start, resident_bytes()
    if reported != np.flatnonzero(is_bad).tolist():
        problems.append(f"{len(reported)} frames reported as damaged, {int(is_bad.sum())} are")
    if next(expected, None) is not None:
        problems.append(f"{answered} frames answered, {int((~is_bad).sum())} are good")
    growth = last / first - 1 if first else float("nan")
    if not growth <= GROWTH:
        problems.append(f"resident memory grew by {growth:.1%}")
    return {
        "frames": frames,
        "network": network,
        "device": predictor.facts["device"],
        "answered": answered,
        "damaged": len(reported),
        "seconds": round(seconds, 1),
        "resident_after_a_tenth": first,
        "resident_at_the_end": last,
        "growth": round(growth, 5),
        "problems": problems,
    }


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--network", choices=("stub", "real"), default="stub")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file to write the result to")
    options = parser.parse_args()
    result = soak(options.frames, options.network, options.device, options.workers)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        record.write(options.json, record.about(options.device), [{"kind": "soak", **result}])
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
