"""Contenders, judged and then timed in turn.

A contender gives scores and maps of batches of images. It is compared with the plain float32
detector first; what is wrong gets no time, and accuracy and times stand in the same row.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from efficientad.benchmark.call_times import SUMMARY, in_turn, ratio, summary
from efficientad.model.agreement import BOUNDS, difference, scale_of, worst
from efficientad.model.detector import EfficientAD

Row = dict[str, Any]
Run = Callable[[Any], tuple[Tensor, Tensor]]  # a batch on the host -> scores, maps on the host
ACCURACY = ("map_error", "map_rms", "score_error", "rank_errors")
ROW = ("kind", "name", "size", "batch", "image_size", "dtype", "device", "backend", *SUMMARY,
       "warmup", *ACCURACY, "no_time")  # fmt: skip


def row(kind: str, name: str, **values: Any) -> Row:
    """A row with every key of ROW; what does not apply is None.

    kind: "end_to_end", "frame", "peer", "ratio", "stage" or "cold_start". Times are milliseconds.
    no_time: why there are none. A row also has `wrong`, True, if that is what was found.
    """
    return dict.fromkeys(ROW) | {"kind": kind, "name": name} | values


# ---- accuracy --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Accuracy:
    """Scores and maps of some images against the plain float32 detector's.

    Attributes:
        map_error, map_rms, score_error: largest and RMS difference of the maps and largest of the
            scores, as parts of max(0.1, largest |map|); None where a value is not finite.
        rank_errors: pairs of images in another order, of those whose scores differ by more than
            twice the bound of the dtype.
        problem: what is wrong, by the bounds of `agreement.BOUNDS`, or None. fp8 has no bound here:
            a predictor is built in it only after it proved itself on calibration images.
    """

    map_error: float | None
    map_rms: float | None
    score_error: float | None
    rank_errors: int | None
    problem: str | None


@torch.no_grad()
def reference(
    detector: EfficientAD, frames: np.ndarray, border: str | None = None
) -> tuple[Tensor, Tensor]:
    """(scores (N,), maps (N, H, W)) of the plain detector in float32 on the CPU, one by one.

    frames: uint8 (N, H, W, 3) of the network's input size. border: another border rule than the
    detector's, with the same quantiles.
    """
    plain = copy.deepcopy(detector).cpu().float()
    if border is not None:
        quantiles = plain.quantiles.tolist()
        plain.set_map_rule(border)
        plain.set_quantiles(*quantiles)
    outputs = [plain(image[None]) for image in as_images(frames)]
    return torch.cat([o.score for o in outputs]), torch.cat([o.anomaly_map for o in outputs])


def as_images(frames: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W) in 0..1."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().float() / 255


def accuracy(
    scores: Tensor, maps: Tensor, expected: tuple[Tensor, Tensor], dtype: torch.dtype
) -> Accuracy:
    """Judge scores (N,) and maps (N, H, W) by the bounds of `dtype`; see `Accuracy`."""
    scores, maps = scores.float().cpu(), maps.float().cpu()
    best, exact = expected
    if scores.shape != best.shape or maps.shape != exact.shape:
        shapes = f"{tuple(scores.shape)} and {tuple(maps.shape)}"
        return Accuracy(None, None, None, None, f"wrong: shapes {shapes}")
    if not (scores.isfinite().all() and maps.isfinite().all()):
        return Accuracy(None, None, None, None, "wrong: values that are not finite")
    scale = scale_of(exact)
    largest, rms = difference(maps, exact, scale)
    score = difference(scores, best, scale).largest
    bounds = BOUNDS.get(dtype) if dtype.itemsize > 1 else None
    apart = 2 * (bounds or BOUNDS[torch.bfloat16])[0] * scale
    swapped = sum(
        abs(float(best[i] - best[j])) > apart
        and not float(best[i] - best[j]) * float(scores[i] - scores[j]) > 0
        for i, j in itertools.combinations(range(len(best)), 2)
    )
    problem = None
    if bounds and not (worst((largest, score)) <= bounds[0] and rms <= bounds[1]):
        problem = (
            f"wrong: map error {largest:.2g} and score error {score:.2g} (bound {bounds[0]:g}), "
            f"RMS {rms:.2g} (bound {bounds[1]:g}), {swapped} pairs in another order"
        )
    map_error, map_rms, score_error = (float(f"{x:.4g}") for x in (largest, rms, score))
    return Accuracy(map_error, map_rms, score_error, swapped, problem)


# ---- contenders ------------------------------------------------------------------------------


@dataclass
class Contender:
    """A row to be filled, and the call without arguments that it is about.

    Where there is no call (None) the row's no_time says why.
    """

    row: Row
    call: Callable[[], object] | None


def contender(
    target: Row,
    run: Run,
    images: Any,
    expected: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
    *,
    sources: Any = None,
    prepare: Callable[[Any], Any] = lambda batch: batch,
) -> Contender:
    """Judge `run` on the images that `expected` is about, in batches of the row's size.

    Args:
        images: as many as `expected` has scores.
        expected: from `reference`; None judges nothing.
        dtype: whose bounds hold.
        sources: what is timed, if other than `images`.
        prepare: applied to every batch, before the clock; `run` takes the result.
    """
    batch = target["batch"]
    parts = [prepare(part) for part in groups(images, batch)]
    if expected is not None:
        found = accuracy(*answers(run, parts, len(images)), expected, dtype)
        target |= {name: getattr(found, name) for name in ACCURACY} | {"no_time": found.problem}
        if found.problem is not None:
            target["wrong"] = True
    if sources is not None:
        parts = [prepare(part) for part in groups(sources, batch)]
    turn = itertools.cycle(parts)
    return Contender(target, lambda: run(next(turn)))


def groups(images: Any, batch: int) -> list[Any]:
    """Batches of exactly `batch` that hold every image, going round; arrays and tensors stay so."""
    count = len(images)
    places = [[(i + k) % count for k in range(batch)] for i in range(0, count, batch)]
    if isinstance(images, (np.ndarray, Tensor)):
        return [images[at] for at in places]
    return [[images[i] for i in at] for at in places]


def answers(run: Run, parts: Sequence[Any], images: int) -> tuple[Tensor, Tensor]:
    """(scores, maps) in float32 of the first `images` images in the batches `parts`."""
    found = [run(part) for part in parts]
    scores, maps = (torch.cat([t.float() for t in ts])[:images] for ts in zip(*found, strict=True))
    return scores, maps


def race(contenders: Sequence[Contender], **options: Any) -> list[Row]:
    """Time the contenders in turn that are not wrong; their rows, and those of the ratios.

    Every row of kind "peer" gets a ratio to every one of kind "end_to_end": how many times longer
    the peer takes for the same batch. options: as `call_times.in_turn` takes them.
    """
    timed = [c for c in contenders if c.row["no_time"] is None]
    calls = {str(i): c.call for i, c in enumerate(timed) if c.call is not None}
    times = in_turn(calls, **options) if calls else {}
    rounds = {id(c.row): times[str(i)].rounds for i, c in enumerate(timed)}
    for i, c in enumerate(timed):
        c.row |= summary(times[str(i)].rounds, c.row["batch"])
        c.row["warmup"] = times[str(i)].warmup
    rows = [c.row for c in contenders]
    kinds = [[c.row for c in timed if c.row["kind"] == kind] for kind in ("end_to_end", "peer")]
    for ours, peer in itertools.product(*kinds):
        shared = {key: ours[key] for key in ("size", "batch", "image_size", "device", "dtype")}
        rows.append(
            row(
                "ratio",
                f"{peer['name']} / {ours['name']}",
                **shared,
                against=peer["name"],
                peer_dtype=peer["dtype"],
                **ratio(rounds[id(peer)], rounds[id(ours)]),
            )
        )
    return rows


# ---- as text ---------------------------------------------------------------------------------

HEAD = (
    f"{'':<36}{'net':>4}{'pixels':>9}{'dtype':>10}{'batch':>6}"
    f"{'p50 ms':>10}{'p90':>9}{'p99':>9}{'max':>9}{'img/s':>9}  map error"
)


def line(row: Row) -> str:
    """A row as a line under HEAD."""
    short = {"stage": f"  {row['name']}", "ratio": f"  vs {row.get('against')}"}
    name = short.get(row["kind"], row["name"])
    pixels = "x".join(map(str, row["image_size"][::-1]))
    head = f"{name:<36}{row['size']:>4}{pixels:>9}{row['dtype'] or '':>10}{row['batch']:>6}"
    if row["no_time"]:
        return f"{head}  no time: {row['no_time']}"
    if row["kind"] == "ratio":
        return f"{head}{row['ratio']:>9.2f}x  (spread {row['ratio_spread']:.2f})"
    if row["kind"] == "cold_start":
        parts = ("import_s", "load_s", "construction_s", "first_call_ms")
        shown = ", ".join(f"{part.replace('_', ' ')} {row[part]:g}" for part in parts)
        return f"{head}{row['p50_ms']:>10.0f}  ({shown})"
    times = "".join(f" {row[key]:>8.3f}" for key in ("p90_ms", "p99_ms", "max_ms"))
    error = "" if row["map_error"] is None else f"{row['map_error']:>11.2g}"
    return f"{head} {row['p50_ms']:>9.3f}{times} {row['images_per_s']:>8.1f}{error}"
