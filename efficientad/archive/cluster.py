"""Ray, quiet: a cluster for one run, or one that is there already."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from efficientad.utils.checks import check_integer

OWN = 2  # processors that Ray's own tasks need beside ours: listing, reading, filtering, writing
_THREADS = 4  # of a scoring process on CPUs at most
_DECODERS = 8  # for each GPU at most
# Otherwise Ray tells its makers of each start, its compiled code writes to the terminal, and
# sixteen processes are started to look at the one file of the manifest.
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS": "1",
}


@dataclass(frozen=True)
class Processes:
    """How many processes decode and score, and what Ray reserves for one that scores."""

    decoders: int
    scorers: int
    scorer_cpus: int
    scorer_gpus: int


def processes(
    cpus: int, gpus: int, decoders: int | None = None, scorers: int | None = None
) -> Processes:
    """A share of a cluster for each kind of process.

    Args:
        cpus, gpus: of the cluster; gpus is 0 where the scoring is not to use them.
        decoders, scorers: how many, where somebody has said so.

    Raises:
        ValueError: it has too few of them.
    """
    usable = cpus - OWN
    for name, value in (("workers", decoders), ("scorers", scorers)):
        if value is not None:
            check_integer(name, value, 1)
    if gpus:
        scorers = scorers or gpus
        if scorers > gpus:
            raise ValueError(f"scorers is {scorers}; the cluster has {gpus} GPUs")
        decoders = decoders or max(1, min(_DECODERS * scorers, usable - scorers))
        each = 1
    else:
        decoders = decoders or max(1, usable // 8)
        left = max(1, usable - decoders)
        scorers = scorers or -(-left // _THREADS)
        each = max(1, left // scorers)
    needed = OWN + decoders + scorers * each
    if needed > cpus:
        raise ValueError(
            f"{decoders} decoding and {scorers} scoring processes need {needed} CPUs, {OWN} of "
            f"them for Ray itself, and the cluster has {cpus}"
        )
    return Processes(decoders, scorers, each, 1 if gpus else 0)


@contextmanager
def cluster(address: str | None, **options: Any) -> Iterator[dict[str, float]]:
    """Connect to a cluster, or start one on this machine, for as long as the block lasts.

    Ray sets a handler for SIGTERM; those that were there before are put back.

    Args:
        address: as of `ray.init`; None starts one. options: others of `ray.init`.

    Yields:
        What the cluster has: "CPU", "GPU" and others.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    if address is None:
        # A number that Ray counts by, not cores that it takes: its own tasks do next to nothing,
        # and a process that decodes mostly waits for those that score.
        options = {"num_cpus": max(2, _cores()) + OWN + 1, "include_dashboard": False} | options
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with _silence():
            ray.init(
                address or "local", log_to_driver=False, logging_level=logging.ERROR, **options
            )
    except ConnectionError as error:
        raise ConnectionError(f"no Ray cluster answers at {address}: {error}") from error
    try:
        ray._private.worker._worker_logs_enabled = False  # "8 worker processes have been started"
        _put_back(handlers)
        yield ray.cluster_resources()
    finally:
        ray.shutdown()
        _put_back(handlers)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def _silence() -> Iterator[None]:
    """What is written to the standard error meanwhile, also by compiled code, is not shown."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _put_back(handlers: dict[signal.Signals, Any]) -> None:
    """Ray's compiled code sets handlers that Python does not know of, so they are set anyway."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
