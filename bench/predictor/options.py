"""Options of `bench.predictor`: of what, where and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from bench.predictor import peers
from efficientad.benchmark import end_to_end
from efficientad.benchmark.call_times import check_counts
from efficientad.fast.options import choose_dtype
from efficientad.model.networks import check_image_size, check_model_size
from efficientad.utils.devices import DTYPES, choose_device, cpu_multiplies_bfloat16

FP8 = "float8_e4m3fn"
DEFAULTS = {
    "cuda": {
        "batches": (1, 2, 4, 8, 16, 32, 64),
        "dtypes": ("float16", "bfloat16", FP8),
        "peer_batches": (1, 16, 32),
        "seconds": 4.0,
        "images": end_to_end.IMAGES,
    },
    "cpu": {"batches": (1, 4), "peer_batches": (1,), "seconds": 4.0, "images": 4},
}


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        device: where.
        sizes, batches, image_sizes, dtypes: of the predictor; the first image size and dtype come
            first, the others after all that is worth more. A CPU takes the first batch alone at
            other image sizes.
        peer_batches: those of `batches` at which the peers run, too.
        peers: their names, or None for all of the device.
        compile: whether peers that need torch.compile are built, at the least and the largest of
            `peer_batches`.
        warmup, calls, rounds, seconds: as in `efficientad.benchmark.call_times.in_turn`.
        images: how many are compared and timed.
        frame_size: (height, width) of the camera frames.
    """

    device: torch.device
    sizes: tuple[str, ...]
    batches: tuple[int, ...]
    image_sizes: tuple[int, ...]
    dtypes: tuple[str, ...]
    peer_batches: tuple[int, ...]
    peers: tuple[str, ...] | None
    compile: bool
    warmup: int
    calls: int
    rounds: int
    seconds: float
    images: int
    frame_size: tuple[int, int]

    @property
    def counts(self) -> dict[str, Any]:
        """For `in_turn`."""
        return {name: getattr(self, name) for name in ("warmup", "calls", "rounds", "seconds")}


def options(device: str | torch.device = "auto", **changes: Any) -> Options:
    """The defaults of a device with some changes; None leaves a default.

    Raises:
        ValueError: an option that does not exist, or has a value out of range.
    """
    device = choose_device(device)
    values = end_to_end.defaults(device) | DEFAULTS[device.type]
    if device.type == "cpu":  # its own first; both, because published figures are in either
        own = str(choose_dtype("auto", device, "auto")).removeprefix("torch.")
        half = ("bfloat16",) if cpu_multiplies_bfloat16() else ()
        values["dtypes"] = tuple(dict.fromkeys((own, "float32", *half)))
    values |= {"sizes": ("S", "M"), "image_sizes": (256, 512), "frame_size": end_to_end.CAMERA}
    values |= {"compile": device.type == "cuda", "peers": None}
    unknown = sorted(set(changes) - set(values))
    if unknown:
        raise ValueError(f"no such option: {', '.join(unknown)}; there are {', '.join(values)}")
    for name, value in changes.items():
        if value is not None:
            values[name] = tuple(value) if isinstance(value, list) else value
    made = Options(device, **values)
    _check(made)
    return made


def _check(made: Options) -> None:
    for name in ("sizes", "image_sizes", "dtypes"):
        if not getattr(made, name):
            raise ValueError(f"{name} is empty; give at least one")
    for size in made.sizes:
        check_model_size(size)
    for length in made.image_sizes:
        check_image_size(length, length)
    for name in made.dtypes:
        if name not in DTYPES:
            raise ValueError(f"dtypes has {name!r}; there are {', '.join(DTYPES)}")
    end_to_end.check_batch_sizes(made.batches)
    check_counts(**made.counts)
    if made.images < 1:
        raise ValueError(f"images is {made.images}; it must be at least 1")
    known = peers.names(made.device, compile=False) + peers.names(made.device, compile=True)
    for name in made.peers or ():
        if name not in known:
            raise ValueError(f"peers has {name!r}; there are {', '.join(map(repr, known))}")


def wanted(options: Options, *, compile: bool) -> tuple[str, ...]:
    """The peers to measure that need torch.compile, or those that do not."""
    known = peers.names(options.device, compile=compile)
    return known if options.peers is None else tuple(n for n in known if n in options.peers)
