"""Pictures of the trainings in bench/results/.

    python -m bench.report.training_curves --out docs/pictures

One picture per training_<name>.json: loss terms, map quantiles and AU-ROC over the steps; one per
teacher_<name>_distillation.json: the held-out loss of a shipped teacher's distillation.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import record

TERMS = {
    "hard": "hard feature loss",
    "penalty": "pretraining penalty",
    "autoencoder": "autoencoder",
    "student_autoencoder": "student, autoencoder",
}
QUANTILES = (
    *("student-teacher, 90 %", "student-teacher, 99.5 %"),
    *("autoencoder, 90 %", "autoencoder, 99.5 %"),
)
# Where a finished run of 70,000 steps stands (EfficientAD-M, MVTec LOCO AD, juice bottle).
FINISHED = (0.0775, 0.1326, 0.0407, 0.1100)


def _axes(panels: int) -> tuple[Any, list[Any]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, figsize=(5.2 * panels, 4.5), dpi=110)
    axes = list(axes) if panels > 1 else [axes]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_xlabel("training step")
    return figure, axes


def _legend(axis: Any) -> None:
    """Below the axes, where it hides no curve."""
    options = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "frameon": False}
    axis.legend(fontsize=8, ncol=2, **options)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # the same bytes from the same numbers
    pyplot.close(figure)


def draw_training(found: dict[str, Any], path: Path) -> None:
    """Loss terms, and where they were measured quantiles and AU-ROC, over the steps."""
    rows = found["rows"]
    measured = [row for row in rows if "metrics" in row]
    figure, axes = _axes(3 if measured else 1)
    steps = [row["step"] for row in rows]
    mean = found["about"]["training"]["hard_quantile"] == 0
    labels = TERMS | ({"hard": "mean feature loss"} if mean else {})
    for term, label in labels.items():
        values = [row.get(term, 0) for row in rows]  # a schedule need not have them all
        if any(values):
            axes[0].plot(steps, values, label=label)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("loss, mean since the entry before")
    _legend(axes[0])
    axes[0].set_title(f"{found['about']['data']}: losses")
    if measured:
        steps = [row["step"] for row in measured]
        for i, (label, finished) in enumerate(zip(QUANTILES, FINISHED, strict=True)):
            values = [row["quantiles"][i] for row in measured]
            (line,) = axes[1].plot(steps, values, marker="o", label=label)
            axes[1].axhline(finished, color=line.get_color(), linestyle=":", alpha=0.7)
        axes[1].set_yscale("log")
        axes[1].set_ylabel("distance")
        axes[1].set_title("map quantiles (dotted: a finished run)")
        _legend(axes[1])
        for figure_name in ("image AU-ROC", "pixel AU-ROC"):
            values = [row["metrics"][figure_name] for row in measured]
            axes[2].plot(steps, values, marker="o", label=figure_name)
        axes[2].set_ylim(top=1.005)
        axes[2].set_ylabel(f"AU-ROC, {measured[0]['metrics']['images']} test images")
        axes[2].set_title("detection")
        _legend(axes[2])
    _save(figure, path)


def draw_distillation(found: dict[str, Any], path: Path) -> None:
    """Training and held-out loss of a teacher's distillation over the steps."""
    figure, (axis,) = _axes(1)
    steps = [row["step"] for row in found["curve"]]
    for key, label in (
        ("train", "training windows"),
        ("held_out", "held-out photos"),
        ("held_out_inner", "held-out, cells of the unpadded network"),
    ):
        axis.plot(steps, [row[key] for row in found["curve"]], marker="o", label=label)
    axis.set_ylabel("mean squared error (normalised features)")
    axis.set_title(found["what"].rpartition("/")[2])
    _legend(axis)
    _save(figure, path)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=record.RESULTS)
    parser.add_argument("--out", type=Path, default=record.ROOT / "docs" / "pictures")
    options = parser.parse_args(argv)
    for file in sorted(options.results.glob("training_*.json")):
        draw_training(record.read(file), options.out / f"{file.stem}.png")
    for teacher in sorted(options.results.glob("teacher_*_distillation.json")):
        found = json.loads(teacher.read_text(encoding="utf-8"))
        draw_distillation(found, options.out / f"{teacher.stem}.png")


if __name__ == "__main__":
    main()
