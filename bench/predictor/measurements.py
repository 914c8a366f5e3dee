"""What `bench.predictor` measures: our predictor, its peers, stages, frames and cold starts."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.predictor import peers
from bench.predictor.options import FP8, Options, wanted
from bench.record import Row
from efficientad.aot.building import DTYPES, build_bundle
from efficientad.benchmark import end_to_end
from efficientad.benchmark.cold_start import cold_start
from efficientad.benchmark.contenders import (
    ACCURACY,
    Contender,
    as_images,
    contender,
    race,
    reference,
    row,
)
from efficientad.benchmark.stages import stages
from efficientad.fast.predictor import FastPredictor
from efficientad.model.calibration import calibrate
from efficientad.model.detector import EfficientAD
from efficientad.model.synthetic import frames as random_frames
from efficientad.model.synthetic import random_detector

CALIBRATION_IMAGES = 32  # of fp8
# A predictor, its detector, frames, and what the plain detector gives for them.
Known = tuple[FastPredictor, EfficientAD, np.ndarray, tuple[Tensor, Tensor]]


class Bench:
    """Detectors, what they give, and the predictors of the last configuration.

    folder: for exported files and calibration images.
    """

    def __init__(self, options: Options, folder: Path) -> None:
        self.options, self.folder = options, folder
        self._made: dict[tuple, Any] = {}
        self._predictors: dict[str, FastPredictor | str] = {}
        self._configuration: tuple | None = None

    def detector(self, size: str, side: int, dtype: str = "") -> EfficientAD:
        """Random weights. For fp8 with the quantiles of the images that fp8 is calibrated on."""
        if dtype == FP8:
            return self._once(("fp8", size, side), lambda: self._recalibrated(size, side))
        return self._once(
            ("detector", size, side), lambda: random_detector(size, image_size=(side, side))
        )

    def _recalibrated(self, size: str, side: int) -> EfficientAD:
        made = copy.deepcopy(self.detector(size, side))
        return calibrate(made, self.good_images(side), statistics=False)

    def good_images(self, side: int) -> Path:
        """A folder of images for fp8."""
        folder = self.folder / f"good-{side}"
        if not folder.exists():
            frames = random_frames(CALIBRATION_IMAGES, side, side, seed=1)
            folder.mkdir()
            for i, data in enumerate(end_to_end.encoded(frames, "png")):
                (folder / f"{i:02}.png").write_bytes(data)
        return folder

    def frames(self, side: int) -> np.ndarray:
        """What contenders are judged and timed on, uint8 (images, side, side, 3)."""
        return self._once(("frames", side), lambda: random_frames(self.options.images, side, side))

    def expected(
        self, size: str, side: int, dtype: str = "", border: str = "nelson"
    ) -> tuple[Tensor, Tensor]:
        """What the plain detector for a dtype gives for these frames under a border rule."""
        return self._once(
            ("expected", size, side, dtype == FP8, border),
            lambda: reference(self.detector(size, side, dtype), self.frames(side), border),
        )

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def predictor(self, size: str, side: int, dtype: str, batch: int) -> FastPredictor | str:
        """The predictor, or why there is none; kept until another network or batch is asked for."""
        if (size, side, batch) != self._configuration:
            self.release()
            self._configuration = (size, side, batch)
        if dtype not in self._predictors:
            self._predictors[dtype] = self._build(size, side, dtype, batch)
        return self._predictors[dtype]

    def _build(self, size: str, side: int, dtype: str, batch: int) -> FastPredictor | str:
        extra = {"calibration": self.good_images(side)} if dtype == FP8 else {}
        detector, device = self.detector(size, side, dtype), self.options.device
        try:
            return end_to_end.build_predictor(detector, (batch,), device, dtype, **extra)
        except ValueError as error:
            return f"not built: {error}"

    def release(self) -> None:
        """Let go of predictors and what they hold on the device."""
        self._predictors.clear()
        self._configuration = None
        free(self.options.device)

    def ours(self, size: str, side: int, dtype: str, batch: int) -> Contender:
        """The predictor as a contender, judged; without a call where there is none."""
        predictor = self.predictor(size, side, dtype, batch)
        if isinstance(predictor, str):
            shared = self._shared(size, side, batch) | {"dtype": dtype, "no_time": predictor}
            return Contender(row("end_to_end", "FastPredictor", **shared), None)
        return end_to_end.ours(*self._known(predictor, size, side, dtype), batch)

    def _known(self, predictor: FastPredictor, size: str, side: int, dtype: str) -> Known:
        """What contenders of `efficientad.benchmark.end_to_end` are made of."""
        detector, expected = self.detector(size, side, dtype), self.expected(size, side, dtype)
        return predictor, detector, self.frames(side), expected

    def peer(self, name: str, size: str, side: int, batch: int) -> Contender:
        """A peer as a contender, judged; without a call where it cannot be built."""
        place = peers.Place(self.options.device, batch, self.folder)
        target = row("peer", name, **self._shared(size, side, batch), backend=name)
        try:
            peer = peers.build(name, self.detector(size, side), place)
            target["dtype"] = str(peer.dtype).removeprefix("torch.")
            images = as_images(self.frames(side))
            expected = self.expected(size, side, border=peer.border)
            return contender(target, peer.run, images, expected, peer.dtype, prepare=peer.prepare)
        except Exception as error:  # of others' software: the rest is still worth measuring
            return Contender(target | {"no_time": peers.reason(error)}, None)

    def _shared(self, size: str, side: int, batch: int) -> dict[str, Any]:
        shape = {"size": size, "batch": batch, "image_size": [side, side]}
        return shape | {"device": str(self.options.device)}

    # ---- measurements ----

    def compare(
        self, size: str, side: int, dtypes: Sequence[str], batch: int, names: Sequence[str] = ()
    ) -> list[Row]:
        """Our predictor in some dtypes and some peers, in turn."""
        try:
            field = [self.ours(size, side, dtype, batch) for dtype in dtypes]
            field += [self.peer(name, size, side, batch) for name in names]
            return race(field, **self.options.counts)
        finally:
            free(self.options.device)

    def compile(self, size: str, side: int, dtypes: Sequence[str], batch: int) -> list[Row]:
        """The peers that need torch.compile; ours ran beside them and has its row elsewhere."""
        torch._dynamo.reset()  # or it would fall back to eager after eight shapes
        rows = self.compare(size, side, dtypes, batch, wanted(self.options, compile=True))
        return [r for r in rows if r["kind"] != "end_to_end"]

    def stages(self, size: str, side: int, dtype: str, batch: int) -> list[Row]:
        """Stages of a step; those of a camera frame with batch 1."""
        judged = self.ours(size, side, dtype, batch).row
        predictor = self.predictor(size, side, dtype, batch)
        if judged["no_time"] or isinstance(predictor, str):
            return [judged | {"kind": "stage"}]
        frame_size = self.options.frame_size if batch == 1 else None
        found = stages(predictor, batch, calls=self.options.calls, frame_size=frame_size)
        return [r | accuracy_of(judged) for r in found]

    def camera(self, size: str, side: int, dtype: str) -> list[Row]:
        """Camera frames as pixels on the host and on the device, and as files, one at a time."""
        predictor = self.predictor(size, side, dtype, 1)
        if isinstance(predictor, str):
            return [self.ours(size, side, dtype, 1).row | {"kind": "frame"}]
        field = end_to_end.camera(
            *self._known(predictor, size, side, dtype), self.options.frame_size
        )
        return race(field, **self.options.counts)

    def cold_start(self, size: str, side: int, dtype: str) -> list[Row]:
        """Fresh processes; on CUDA one that has to compile its kernels, one that finds them in
        Triton's cache, and one that has no cache but a kernel bundle."""
        judged = self.ours(size, side, dtype, 1).row
        if judged["no_time"]:
            return [judged | {"kind": "cold_start"}]
        self.release()
        detector, device = self.detector(size, side, dtype), self.options.device
        start = partial(cold_start, detector, device=str(device), dtype=dtype, batch_sizes=(1,))
        if device.type != "cuda":
            return [start(empty_cache=False) | accuracy_of(judged)]
        found = [start(empty_cache=empty) for empty in (True, False)]
        if dtype in DTYPES:
            arch = "{}{}".format(*torch.cuda.get_device_capability(device))
            path = self.folder / f"{size}-{side}-{dtype}.kernels"
            build_bundle(detector, path, arch, dtype=dtype, batch_sizes=(1,))
            found.append(start(empty_cache=True, bundle=path))
        return [r | accuracy_of(judged) for r in found]


def accuracy_of(judged: Row) -> Row:
    return {name: judged[name] for name in ACCURACY}


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
