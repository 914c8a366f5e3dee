"""Trains a detector on a data set and records its accuracy.

    python -m bench.training.accuracy mvtec/screw --photos photos/ --name screw --out runs/a
    python -m bench.training.accuracy mvtec/screw --name screw-no-penalty --out runs/b
    python -m bench.training.accuracy mvtec/screw --schedule instant --name screw-i --out runs/c

One run is one training (`efficientad.fit`) with its curve and its accuracy. In the paper's
schedule, without --photos the pretraining penalty is left out, with --hard-quantile 0 the hard
feature loss: two of the paper's ablations (Tables 4 and 5). The third, the normalisation of the
maps, needs no training: every detector is measured with quantiles, with mean and standard deviation
of the same validation maps in their place (Table 5), with the maps as they are, with either map
alone, and with the mean of the 10 largest cells as the score. A row for each goes to
bench/results/accuracy.json, the curve to bench/results/training_<name>.json. An interrupted run
continues when it is started again.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from bench import record
from efficientad.data.datasets import DataSet
from efficientad.data.layouts import open_dataset
from efficientad.evaluation.metrics import PixelMetrics, image_metrics
from efficientad.model.detector import EfficientAD
from efficientad.model.image_score import ScoreRule, described
from efficientad.results.plain_path import RawMaps, distance_maps, image_score, sized_map
from efficientad.training.fitting import fit
from efficientad.utils.devices import choose_device
from efficientad.utils.files import write_text

TABLE = record.RESULTS / "accuracy.json"
PRO_LIMIT = 0.3
Areas = dict[str, float | None]  # the three figures of a row; None: undefined for these images
NORMALIZATIONS = (
    "quantiles",
    "quantiles of the same weight",
    "gaussian",
    "none",
    "student-teacher alone",
    "autoencoder alone",
)
CELLS = 10  # of the row "score: mean of the 10 largest cells"
_AWAY = 1e6  # q_b - q_a at which a map no longer counts beside the other


def figures(detector: EfficientAD, dataset: DataSet, raws: Iterable[RawMaps]) -> Areas:
    """Image AU-ROC, pixel AU-ROC and AU-PRO of raw test maps under the detector's quantiles.

    The last two are None without masks.
    """
    labels, scores, pixels = [], [], PixelMetrics() if dataset.has_masks else None
    for raw in raws:
        sample = dataset.test[raw.index]
        labels.append(sample.label)
        scores.append(image_score(detector, raw))
        if pixels is not None:
            sized = sized_map(detector, raw, dataset.mask_size(sample))
            pixels.update(sized, dataset.read_mask(sample))
    return areas(labels, scores, pixels)


def areas(labels: list[int], scores: list[float], pixels: PixelMetrics | None) -> Areas:
    """The three figures of a row."""
    image = image_metrics(labels, scores).au_roc
    if pixels is None:
        return {"image_auroc": image, "pixel_auroc": None, "aupro": None}
    pixel = pixels.compute()
    return {
        "image_auroc": image,
        "pixel_auroc": pixel.au_roc,
        "aupro": pixel.au_pro[PRO_LIMIT],
    }


def image_auroc(
    detector: EfficientAD, dataset: DataSet, raws: Iterable[RawMaps], score: ScoreRule
) -> float | None:
    """Image AU-ROC of raw test maps where the score is another; the detector stays as it is."""
    other = copy.deepcopy(detector)
    other.score = score
    found = [(dataset.test[raw.index].label, image_score(other, raw)) for raw in raws]
    return image_metrics(*zip(*found, strict=True)).au_roc


def normalization(name: str, detector: EfficientAD, validation: list[RawMaps]) -> list[float]:
    """What stands for (q_a, q_b) of both maps: M -> 0.1 (M - q_a) / (q_b - q_a), section 3.3.

    quantiles: the detector's. quantiles of the same weight: those of the paper, where the detector
    weighs the autoencoder's map less. gaussian: mean and mean + standard deviation of the
    validation maps' cells, so that a map is standardised. none: 0 and 1, the maps as they are.
    "... alone": the detector's for that map, and the other as good as left out.
    """
    own = detector.quantiles.tolist()
    if name == "quantiles":
        return own
    if name == "quantiles of the same weight":
        return [*own[:3], own[2] + (own[3] - own[2]) * detector.autoencoder_weight]
    if name.endswith(" alone"):
        nothing = [0.0, _AWAY]
        return [*own[:2], *nothing] if name.startswith("student") else [*nothing, *own[2:]]
    if name == "none":
        return [0.0, 1.0, 0.0, 1.0]
    values = []
    for kind in ("map_st", "map_ae"):
        cells = torch.cat([getattr(raw, kind).flatten() for raw in validation]).double()
        mean, std = cells.mean().item(), cells.std().item()
        values += [mean, mean + std]
    return values


def measure(detector: EfficientAD, dataset: DataSet) -> dict[str, Areas]:
    """Figures on the test images per normalisation and by score; the networks run once."""
    raws = list(distance_maps(detector, [sample.path for sample in dataset.test]))
    held_out = list(distance_maps(detector, [sample.path for sample in dataset.validation]))
    own = detector.quantiles.tolist()
    choices = {name: normalization(name, detector, held_out) for name in NORMALIZATIONS}
    found = {}
    for name, quantiles in choices.items():
        detector.set_quantiles(*quantiles)
        found[name] = figures(detector, dataset, raws)
    detector.set_quantiles(*own)
    other = image_auroc(detector, dataset, raws, CELLS)  # pixels' figures do not depend on it
    found[f"score: {described(CELLS)}"] = {**found["quantiles"], "image_auroc": other}
    return found


def add_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to the table, a JSON list; rows of the same kind and name are replaced."""
    kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    new = {(row["kind"], row["name"]) for row in rows}
    kept = [row for row in kept if (row["kind"], row["name"]) not in new]
    write_text(path, json.dumps([*kept, *rows], indent=1, allow_nan=False) + "\n")


def row_of(kind: str, name: str, facts: dict[str, Any], **values: Any) -> dict[str, Any]:
    """A row of the table; `facts` from `record.about`."""
    copied = {key: facts[key] for key in ("device", "commit", "date", "command")}
    return {"kind": kind, "name": name, **values, **copied, "torch": facts["versions"]["torch"]}


class Curve:
    """The history of a training, with the seconds so far; printed and kept on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries = json.loads(path.read_text()) if path.is_file() else []
        self._clocks = {"seconds": time.monotonic, "cpu_seconds": time.process_time}
        last = self.entries[-1] if self.entries else {}
        self._start = {name: last.get(name, 0.0) - now() for name, now in self._clocks.items()}
        self._end: dict[str, float] | None = None

    def seconds(self) -> dict[str, float]:
        """So far, or when it was finished."""
        if self._end is not None:
            return self._end
        return {n: round(self._start[n] + now(), 1) for n, now in self._clocks.items()}

    def finish(self) -> None:
        """The training is over, with its calibration."""
        self._end = self.seconds()

    def __call__(self, entry: dict[str, Any]) -> None:
        self.entries = [e for e in self.entries if e["step"] < entry["step"]]
        self.entries.append({**entry, **self.seconds()})
        write_text(self.path, json.dumps(self.entries, indent=1))
        print(json.dumps(self.entries[-1]), flush=True)


def run(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Train, or continue, and measure; writes the curve and the rows, and returns the rows."""
    dataset = open_dataset(options.data, options.layout)
    facts = record.about(choose_device(options.device))
    options.out.mkdir(parents=True, exist_ok=True)
    # While it trains, a fixed part of the test images shows the trend; all count at the end.
    trend = dataclasses.replace(dataset, test=dataset.test[:: options.curve_part])
    curve = Curve(options.out / "curve.json")
    detector = fit(
        trend,
        out=options.out / f"{options.name}.safetensors",
        size=options.size,
        schedule=options.schedule,
        steps=options.steps,
        teacher=options.teacher,
        penalty=options.photos or None,
        hard_quantile=options.hard_quantile,
        warm_start=options.warm_start,
        learning_rate=options.learning_rate,
        seed=options.seed,
        device=options.device,
        dtype=options.dtype,
        evaluate_every=options.evaluate_every,
        checkpoint_every=options.checkpoint_every,
        log_every=options.log_every,
        resume=False if options.schedule == "instant" else "auto",
        on_history=curve,
    )
    curve.finish()
    training = detector.provenance["training"]
    about = {**facts, "data": dataset.name, "training": training, "curve_part": options.curve_part}
    if curve.entries:
        record.write(record.RESULTS / f"training_{options.name}.json", about, curve.entries)
    rows = []
    for name, found in measure(detector, dataset).items():
        of_score = name.startswith("score: ")
        part = f", {name}" if of_score else f", maps: {name}"
        rows.append(
            row_of(
                "efficientad",
                options.name if name == "quantiles" else f"{options.name}{part}",
                facts,
                dataset=dataset.name,
                size=options.size,
                teacher=training["teacher"],
                schedule=training["schedule"],
                steps=training.get("steps", 0),
                **curve.seconds(),
                **found,
                quantiles=detector.quantiles.tolist(),
                normalization="quantiles" if of_score else name,
                score=CELLS if of_score else detector.score,
                autoencoder_weight=detector.autoencoder_weight,
                hard_quantile=training.get("hard_quantile"),
                warm_start=training.get("warm_start"),
                penalty=training.get("pretraining_penalty"),
                learning_rate=training.get("learning_rate"),
                dtype=training["dtype"],
                threads=torch.get_num_threads(),
                seed=options.seed,
                test_images=len(dataset.test),
            )
        )
        print(json.dumps(rows[-1]), flush=True)
    add_rows(options.json, rows)
    return rows


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = made.add_argument
    add("data", type=Path, help="data set with a test part and masks, MVTec AD's layout or VisA's")
    add("--layout", choices=("auto", "mvtec", "loco", "visa"), default="auto")
    add("--photos", type=Path, nargs="+", help="folders of photos; none: no pretraining penalty")
    add("--name", required=True, help="of the run, in the table and in file names")
    add("--out", type=Path, required=True, help="folder for the detector and the training's state")
    add("--size", choices=("S", "M"), default="S")
    add("--teacher", type=Path, help="default: the one that ships")
    add("--schedule", choices=("paper", "short", "instant"), default="paper")
    add("--steps", type=int, help="default: the schedule's")
    add("--hard-quantile", type=float, help="0: the mean over all elements")
    add("--warm-start", action="store_true", help="see `efficientad.fit`")
    add("--learning-rate", type=float)
    add("--seed", type=int, default=42)
    add("--device", default="auto")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--evaluate-every", type=int, default=0, metavar="N", help="steps; 0: only at the end")
    add("--curve-part", type=int, default=2, metavar="K", help="every K-th test image meanwhile")
    add("--checkpoint-every", type=int, default=200, metavar="N", help="steps")
    add("--log-every", type=int, default=50, metavar="N", help="steps")
    add("--json", type=Path, default=TABLE, help="the table")
    return made


if __name__ == "__main__":
    run(parser().parse_args())
