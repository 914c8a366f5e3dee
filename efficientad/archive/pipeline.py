"""Manifest to rows on Ray Data: read, decode, score, write."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray.data
from pyarrow import parquet as pq
from ray.data.checkpoint import CheckpointConfig, CheckpointManager

from efficientad.archive.cluster import Processes
from efficientad.archive.output import Places
from efficientad.archive.rows import decoded, scored
from efficientad.data.opening import LIMIT
from efficientad.fast.frame_inputs import FramePredictor
from efficientad.utils.checks import ValueRange

_FILTER_MEMORY = 64 << 20  # that Ray reserves for the process that leaves out what is done


@dataclass(frozen=True)
class Work:
    """What is to be done to each picture.

    Attributes:
        root: see `Manifest`. value_range: the detector's. digest: of its file.
        predictor: makes what scores, in each scoring process. batch: pictures that it gets at once.
    """

    root: str
    value_range: ValueRange | None
    digest: str
    predictor: Callable[[], FramePredictor]
    batch: int


class Decoder:
    """A process that reads and decodes; see `rows.decoded`.

    limit: of megapixels, as the environment variable has it where the command runs.
    """

    def __init__(self, root: str, value_range: ValueRange | None, limit: str | None) -> None:
        self._root, self._value_range = root, value_range
        if limit is not None:
            os.environ[LIMIT] = limit

    def __call__(self, rows: pa.Table) -> Iterator[pa.Table]:
        yield from decoded(rows, self._root, self._value_range)


class Scorer:
    """A process that has a predictor; see `rows.scored`."""

    def __init__(self, predictor: Callable[[], FramePredictor], digest: str) -> None:
        self._predictor, self._digest = predictor(), digest

    def __call__(self, frames: pa.Table) -> pa.Table:
        return scored(frames, self._predictor, self._digest)


class Settled(CheckpointManager):
    """The ids in the checkpoint, which `output.prepare` has just written and sorted.

    Ray's own manager reads them in several tasks, and first removes rows by what it finds pending.
    """

    def load_checkpoint(self, data_file_dir: Any = None, data_file_filesystem: Any = None) -> Any:
        ids = pq.read_table(self.checkpoint_path, columns=[self.id_column])[self.id_column]
        values = ids.to_numpy()
        return (ray.put(values), values.nbytes) if len(values) else (None, 0)


def run(places: Places, work: Work, share: Processes, *, block: int, file: int) -> None:
    """Score what the checkpoint does not name, and write it.

    block: rows of the manifest that a process decodes at a time. file: rows of a file of the result
    at least, but for the last ones.

    Raises what Ray raises where a process fails again and again.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    for name in ("ray.data", "ray"):  # an error is raised as well; Ray's files have its traceback
        logging.getLogger(name).setLevel(logging.CRITICAL)
    context.checkpoint_config = CheckpointConfig(
        "id",
        str(places.checkpoint),
        delete_checkpoint_on_success=False,
        checkpoint_manager_cls=Settled,
    )
    context.checkpoint_config.checkpoint_actor_pool_max_size = 1
    context.checkpoint_config.checkpoint_actor_memory_bytes = _FILTER_MEMORY
    options: dict[str, Any] = {"batch_format": "pyarrow", "zero_copy_batch": True}
    (
        ray.data.read_parquet(str(places.manifest))
        .repartition(target_num_rows_per_block=block)
        .map_batches(
            Decoder,
            fn_constructor_args=(work.root, work.value_range, os.environ.get(LIMIT)),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=share.decoders),
            num_cpus=1,
            **options,
        )
        .map_batches(
            Scorer,
            fn_constructor_args=(work.predictor, work.digest),
            batch_size=work.batch,
            compute=ray.data.ActorPoolStrategy(size=share.scorers),
            num_cpus=share.scorer_cpus,
            num_gpus=share.scorer_gpus,
            **options,
        )
        .write_parquet(str(places.rows), mode="append", min_rows_per_file=file)
    )
