"""One run of an archive, from its manifest to its summary."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet as pq

from efficientad.archive import output
from efficientad.archive.cluster import cluster, processes
from efficientad.archive.manifest import Manifest, read_manifest
from efficientad.archive.output import Places, Summary
from efficientad.fast.frame_inputs import FramePredictor
from efficientad.fast.options import DEFAULT_BUCKETS, choose_dtype
from efficientad.fast.predictor import FastPredictor
from efficientad.model.detector import EfficientAD, check_detector
from efficientad.utils.checks import check_integer
from efficientad.utils.devices import DTYPES, choose_device

DEVICES = ("auto", "cpu", "cuda")
BATCH = {"cpu": 16, "cuda": 64}  # pictures that are handed to a predictor at once
FILE = {"cpu": 128, "cuda": 1024}  # rows of a file: some seconds' work, which a kill costs
BLOCK = 64  # rows of the manifest that a process decodes at a time
_RAISED = re.compile(r"[A-Za-z_][\w.]*: ")  # "ValueError: ..." at the start of a line
_SECONDS = 1.0  # between two looks at what is written
Progress = Callable[[int, int], object]  # rows that are there, pictures of the manifest


class WorkerError(OSError):
    """The cluster's processes failed in a way that is not a picture's."""


@dataclass(frozen=True)
class Running:
    """How an archive is computed.

    Attributes:
        device: "auto" (GPUs where the cluster has any), "cpu" or "cuda"; one GPU a process.
        dtype: see `FastPredictor`. batch_size: pictures in one step at most; None: what suits.
        workers, scorers: processes that decode and that score; None: as many as fit.
        address: of a Ray cluster, as `ray.init` takes it; None: one of its own on this machine.
        predictor: makes what scores, in each process, of a FastPredictor's arguments.
        block, file: see `pipeline.run`; None: BLOCK and FILE. ray: more options of `ray.init`.

    Raises:
        ValueError: one that is not as above.
    """

    device: str = "auto"
    dtype: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    scorers: int | None = None
    address: str | None = None
    predictor: Callable[..., FramePredictor] = FastPredictor
    block: int | None = None
    file: int | None = None
    ray: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(
                f"device is {self.device!r}; it must be one of {', '.join(DEVICES)}: each process "
                "is given a GPU of its own by Ray"
            )
        if self.dtype not in ("auto", *DTYPES) or self.dtype == "float8_e4m3fn":
            raise ValueError(
                f"dtype is {self.dtype!r}; it must be auto, float32, float16 or bfloat16"
            )
        if self.device == "cpu":
            choose_dtype(self.dtype, choose_device("cpu"), "auto")
        for name in ("batch_size", "workers", "scorers"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), 1)


def archive(
    source: str | os.PathLike,
    detector: EfficientAD,
    digest: str,
    out: str | os.PathLike,
    running: Running | None = None,
    *,
    retry_failed: bool = False,
    progress: Progress | None = None,
    stopped: Callable[[Summary], object] | None = None,
) -> Summary:
    """Score the pictures of a manifest that an output folder has no row of.

    Args:
        source: see `read_manifest`. detector: calibrated. digest: of its file.
        out: the output folder, on a disk that every node of the cluster has under the same path.
        running: how it is computed.
        retry_failed: try pictures again that have an error in the place of a verdict.
        progress: called now and then, from a thread. stopped: called with the sums where the run is
            interrupted.

    Returns:
        The sums, of the whole manifest.

    Raises:
        ValueError: a detector, a manifest or an output folder that is not as it must be, or a
            cluster that is too small; nothing is computed. ConnectionError: no cluster answers.
        WorkerError: its processes fail.
    """
    running = running or Running()
    check_detector(detector)
    if not detector.calibrated:
        detector.raise_uncalibrated()
    manifest = read_manifest(source)
    with output.opened(Path(out), _settings(detector, digest, running, manifest)) as places:
        there = output.settle(places, drop_failed=retry_failed)
        output.check_paths(manifest, there, Path(out))
        left = output.prepare(places, manifest, there)
        pictures = len(manifest.table)
        if not left:
            return output.summary(manifest, there, left)
        try:
            with _watched(places, pictures - left, pictures, progress):
                _compute(places, manifest, detector, digest, running)
        except KeyboardInterrupt:
            if stopped is not None:
                stopped(output.summary(manifest, output.settle(places), left))
            raise
        return output.summary(manifest, output.settle(places), left)


def _settings(
    detector: EfficientAD, digest: str, running: Running, manifest: Manifest
) -> dict[str, Any]:
    """What the rows depend on."""
    names = manifest.table.column_names
    label = str(manifest.table.schema.field("label").type) if "label" in names else None
    return {
        "model": digest,
        "threshold": detector.threshold,
        "device": running.device,
        "dtype": running.dtype,
        "label": label,
    }


def _compute(
    places: Places, manifest: Manifest, detector: EfficientAD, digest: str, running: Running
) -> None:
    """The part in which there is a cluster."""
    with cluster(running.address, **(running.ray or {})) as has:
        import ray

        from efficientad.archive.pipeline import Work, run

        gpus = 0 if running.device == "cpu" else int(has.get("GPU", 0))
        if running.device == "cuda" and not gpus:
            raise ValueError("device is 'cuda', and the cluster has no GPU; use 'cpu' or 'auto'")
        device, most = "cuda" if gpus else "cpu", running.batch_size
        sizes = None
        if most is not None:
            sizes = (*(size for size in DEFAULT_BUCKETS["cuda"] if size < most), most)
        predictor = functools.partial(
            running.predictor, detector, device=device, dtype=running.dtype, batch_sizes=sizes
        )
        share = processes(int(has.get("CPU", 0)), gpus, running.workers, running.scorers)
        work = Work(manifest.root, detector.value_range, digest, predictor, most or BATCH[device])
        block, file = running.block or BLOCK, running.file or FILE[device]
        try:
            run(places, work, share, block=block, file=file)
        except ray.exceptions.RayError as error:
            raise WorkerError(
                f"the processes of the cluster failed: {reason_of(str(error))}"
            ) from error


def reason_of(text: str) -> str:
    """What was raised in a process, out of the traceback that Ray makes of it."""
    ours = text.partition("\n\nThe above exception was the direct cause")[0]
    lines = ours.strip().splitlines() or ["no reason given"]
    return next((line for line in reversed(lines) if _RAISED.match(line)), lines[-1])


@contextmanager
def _watched(places: Places, done: int, total: int, progress: Progress | None) -> Iterator[None]:
    """Tell the progress by the files that are finished."""
    if progress is None:
        yield
        return
    ended = threading.Event()
    known = set(output.row_files(places))

    def watch() -> None:
        there = done
        while not ended.wait(_SECONDS):
            for file in output.row_files(places):
                if file not in known:
                    with contextlib.suppress(OSError, pa.ArrowInvalid):  # not finished
                        there += pq.read_metadata(file).num_rows
                        known.add(file)
            progress(min(there, total), total)

    thread = threading.Thread(target=watch, name="efficientad-archive", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
