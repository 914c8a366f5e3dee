"""An archive's command as a process that can be killed, on a cluster that is there, with a network
that costs nothing.

    python tests/helpers_archive.py MANIFEST OUT ADDRESS
"""

from __future__ import annotations

import sys
import time

import numpy as np
import torch

from efficientad.archive.running import Running, archive
from efficientad.model.detector import EfficientAD


def light_detector() -> EfficientAD:
    """Calibrated by hand; its weights are never used."""
    detector = EfficientAD("S")
    detector.set_statistics(torch.zeros(384), torch.ones(384))
    detector.set_quantiles(0.1, 0.2, 0.3, 0.4)
    detector.threshold = 100.0
    return detector


class Mean:
    """A predictor whose scores are the pictures' means, in two milliseconds each."""

    def __init__(self, detector: EfficientAD | None = None, **options: object) -> None:
        self.threshold = 100.0 if detector is None else detector.threshold

    def predict_frames(self, frames, *, map_size, batched):
        assert map_size is None
        assert batched
        time.sleep(0.002 * len(frames))
        self.score = np.array([np.float32(frame.mean()) for frame in frames])
        return self

    def cpu(self):
        return self


def main() -> None:
    manifest, out, address = sys.argv[1:]
    running = Running(
        device="cpu", workers=2, scorers=2, address=address, predictor=Mean, block=50, file=200
    )
    found = archive(manifest, light_detector(), "digest", out, running)
    print(found.pictures, found.scored, found.failed, found.missing, found.before, flush=True)


if __name__ == "__main__":
    main()
