"""What a process that forks, and one that was forked, has to know.

The threads in which torch computes do not come along into a child of fork(), and torch waits for
them for ever. So the child of a process in which this package has computed gets one thread, which
needs no other, and is told once what to do instead.
"""

from __future__ import annotations

import os
import pickle
import threading
import warnings
import weakref
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch

C = TypeVar("C", bound=type)
ADVICE = (
    "load the detector in the process that computes (gunicorn without --preload or in post_fork, a "
    "pool's initializer), or start processes with multiprocessing's 'spawn'"
)


_holders: weakref.WeakSet[Any] = weakref.WeakSet()


class _State:
    computed = False  # in this process or in one that it was forked from
    alone = False  # without the threads of the process that it was forked from


def computing() -> None:
    """To be called before this package computes with torch; warns once in a forked child."""
    _State.computed = True
    if _State.alone:
        _State.alone = False
        warnings.warn(
            "this process was forked from one that had computed before, and its threads do not "
            f"exist here: it computes in one thread. To use all, {ADVICE}",
            stacklevel=3,
        )


def fresh_lock_after_fork(holder: Any) -> None:
    """Give `holder.lock`, which a thread may hold at a fork(), anew to the child."""
    _holders.add(holder)


def _in_child() -> None:
    for holder in list(_holders):
        holder.lock = threading.Lock()
    if _State.computed:
        torch.set_num_threads(1)
        _State.alone = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def pickled_by_content(cls: C) -> C:
    """Class decorator: objects that go to another process take their tensors along.

    multiprocessing would pass them in shared memory: a change here would show there, and a
    container with little of it would kill the process.
    """
    ForkingPickler.register(cls, _by_content)
    return cls


def _by_content(value: object) -> tuple[Any, tuple[bytes]]:
    return pickle.loads, (pickle.dumps(value),)
