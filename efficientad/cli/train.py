"""`efficientad train`.

Exit codes: 0 trained; 1 trained, but some images could not be read (they are listed); 130 stopped
by Ctrl-C, with the state on the disk.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from efficientad.cli.common import (
    EXIT_OK,
    EXIT_SOME_FAILED,
    EXIT_STOPPED,
    Bars,
    add_layout,
    add_region,
    add_score,
    add_value_range,
    print_notes,
    print_threshold_trust,
    progress_bars,
    trust_sentence,
    value_range_of,
)

if TYPE_CHECKING:
    from efficientad.data.datasets import DataSet
    from efficientad.model.detector import EfficientAD


def add_train(commands: Any) -> None:
    """Add the parser of `train` to the subparsers of the command line."""
    command = commands.add_parser(
        "train",
        help="train a detector on good images",
        description="Train student and autoencoder on good images (Algorithm 1 of the paper), "
        "calibrate on those held out, and write one detector file. An interrupted training "
        "continues with --resume.",
    )
    add = command.add_argument
    add("data", type=Path, help="folder of good images, or a data set in a known layout")
    add("--out", type=Path, default=Path("detector.safetensors"), help="file to write")
    add("--force", action="store_true", help="replace an existing file and checkpoint")
    add_layout(command)
    add(
        "--schedule",
        choices=("paper", "short", "instant"),
        help="paper: 70,000 steps; short: minutes on a CPU, the default there unless --steps, "
        "--penalty or --warm-start is given; instant: no gradient step, about a minute",
    )
    add("--size", choices=("S", "M"), default="S", help="small or medium networks (default S)")
    add(
        "--teacher",
        type=Path,
        help="teacher file, or one that ships: research (default) or commercial (see README)",
    )
    add(
        "--penalty",
        type=Path,
        metavar="PHOTOS",
        help="folder of photos of anything for the pretraining penalty (ImageNet in the paper)",
    )
    add("--steps", type=int, help="70,000 in the paper, 1,000 in the short schedule")
    add("--batch-size", type=int, help="images per step: 1 in the paper, 2 in the short schedule")
    add(
        "--image-size",
        type=int,
        nargs=2,
        default=(256, 256),
        metavar=("HEIGHT", "WIDTH"),
        help="images are resized to it; at least 256",
    )
    add("--padding", action="store_true", help="the padded networks (64 cells at 256 pixels)")
    add("--learning-rate", type=float, help="1e-4 in the paper, 3e-4 in the short schedule")
    add("--weight-decay", type=float, help="1e-5 in the paper, 0 in the short schedule")
    add("--hard-quantile", type=float, help="default 0.999; 0: mean of all, an ablation")
    add(
        "--warm-start",
        action="store_true",
        help="start the student's inner layers from the teacher's: for short trainings",
    )
    add("--fpr", type=float, default=0.01, help="share of held-out images above the threshold")
    add_value_range(command)
    add_region(command, "it is learned, calibrated and kept in the detector")
    add_score(command, "max")
    add(
        "--global-term",
        action="store_true",
        help="also judge images as a whole, for parts that are missing or too many; see "
        "docs/image-score.md",
    )
    add("--seed", type=int, default=42)
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1 ...")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    add("--deterministic", action="store_true", help="the same bits every time on a GPU; slower")
    add("--workers", type=int, default=2, help="threads that decode and augment ahead")
    add("--threads", type=int, help="that compute, on a CPU (default: as many as are fastest now)")
    add("--checkpoint", type=Path, help="state for --resume; default: OUT with suffix .training")
    add("--checkpoint-every", type=int, default=1000, metavar="N", help="steps")
    add("--resume", action="store_true", help="continue from the checkpoint if it is there")
    add("--evaluate-every", type=int, default=0, metavar="N", help="steps; 0: not while training")
    add("--log-every", type=int, default=100, metavar="N", help="steps between lines of losses")
    add(
        "--no-picture",
        action="store_true",
        help="do not score the training images, name the worst and draw OUT with .scores.png",
    )


def run_train(options: argparse.Namespace) -> int:
    """Carry out `efficientad train`; returns the exit code."""
    from efficientad.checkpoint.teachers import teacher_license
    from efficientad.data.image_files import left_out
    from efficientad.data.layouts import open_dataset
    from efficientad.data.remarks import header_notes
    from efficientad.training.fitting import fit
    from efficientad.training.schedules import ASKED, SETTINGS, choose_schedule
    from efficientad.training.settings import PenaltyWarning, TrainingStopped, state_beside

    if options.out.exists() and not options.force and not options.resume:
        raise ValueError(
            f"{options.out} exists; give --resume to continue its training, --force to replace it, "
            "or another name"
        )
    value_range = value_range_of(options)
    dataset = open_dataset(options.data, options.layout, options.category)
    print(
        f"{dataset.name}: {len(dataset.train)} good images to train on, "
        f"{len(dataset.validation)} held out for validation, {len(dataset.test)} for tests"
    )
    print_notes(dataset.notes)
    print_notes(header_notes([sample.path for sample in dataset.train]))
    schedule, _ = choose_schedule(
        options.schedule, options.device, {name: getattr(options, name) for name in ASKED}
    )
    steps = options.steps or SETTINGS[schedule].get("steps", 0)
    print(f"schedule {schedule}: {steps or 'no gradient'} steps")
    if options.penalty is not None:
        print_notes(left_out(options.penalty))
    elif schedule == "paper":
        print("warning: no --penalty: training without the pretraining penalty of the paper")
    license = teacher_license(options.teacher) if options.teacher or options.size == "S" else None
    if license is not None:
        print(f"licence of the teacher, and so of the detector: {license}")
    checkpoint = options.checkpoint or state_beside(options.out)
    resumed = options.resume and checkpoint.exists()
    if options.resume and not resumed:
        print(f"no state in {checkpoint}: the training starts anew")
    with warnings.catch_warnings(), progress_bars(lines=True) as bars:
        warnings.simplefilter("ignore", PenaltyWarning)
        course = _Course(steps, resumed, bars)
        try:
            detector = fit(
                dataset,
                out=options.out,
                schedule=schedule,
                size=options.size,
                steps=options.steps,
                batch_size=options.batch_size,
                teacher=options.teacher,
                penalty=options.penalty,
                image_size=tuple(options.image_size),
                padding=options.padding,
                seed=options.seed,
                learning_rate=options.learning_rate,
                weight_decay=options.weight_decay,
                hard_quantile=options.hard_quantile,
                warm_start=options.warm_start,
                false_positive_rate=options.fpr,
                value_range=value_range,
                region=options.region,
                score="max" if options.score is None else options.score,
                global_term=options.global_term,
                device=options.device,
                dtype=options.dtype,
                workers=options.workers,
                threads=options.threads,
                checkpoint=options.checkpoint,
                checkpoint_every=options.checkpoint_every,
                resume="auto" if options.resume else False,
                force=options.force,
                evaluate_every=options.evaluate_every,
                log_every=options.log_every,
                deterministic=options.deterministic,
                progress=course.progress,
                on_history=course.entry,
            )
        except TrainingStopped as stopped:
            print(stopped, file=sys.stderr)
            return EXIT_STOPPED
    facts, calibration = (detector.provenance[name] for name in ("training", "calibration"))
    print(f"held-out q_b - q_a: {_spreads(detector.quantiles.tolist())}")
    print(
        f"threshold {detector.threshold:.6g} from {calibration['threshold_rests_on']} "
        "held-out images"
    )
    print_threshold_trust(calibration, options.fpr, "held-out images")
    print(f"saved: {options.out}")
    for path, reason in facts["unreadable"]:
        print(f"failed: {path}: {reason}", file=sys.stderr)
    if not options.no_picture:
        _show_fit(detector, dataset, options)
    return EXIT_SOME_FAILED if facts["unreadable"] else EXIT_OK


def picture_beside(out: Path) -> Path:
    """Where the picture of a detector's scores lies."""
    return out.with_suffix(".scores.png")


def _show_fit(detector: EfficientAD, dataset: DataSet, options: argparse.Namespace) -> None:
    """Score the training images, name those that fit worst, and write the picture."""
    from efficientad.evaluation.training_fit import training_fit
    from efficientad.fast.predictor import FastPredictor
    from efficientad.results.score_picture import Card, save_picture, score_picture
    from efficientad.utils.devices import choose_device
    from efficientad.utils.files import names_below

    paths = [sample.path for sample in dataset.train]
    detector.to(choose_device(options.device))
    predictor = FastPredictor(detector, batch_sizes=(1,), map_size=None)
    with progress_bars(lines=True) as bars:
        fit = training_fit(
            detector, paths, predictor=predictor, workers=options.workers, progress=bars
        )
    threshold, calibration = detector.threshold, detector.provenance["calibration"]
    names = names_below([misfit.path for misfit in fit.worst], paths)
    if fit.worst:
        print("training images that fit worst; is a bad part among them?")
    cards = []
    for misfit, name in zip(fit.worst, names, strict=True):
        remark = "far above all" if misfit.far else ""
        if not (threshold is None or misfit.score <= threshold):
            remark = remark or "above the threshold"
        print(f"  {misfit.score:.4f}  {name}{f'  ({remark})' if remark else ''}")
        cards.append(Card(name, misfit.score, misfit.image, misfit.anomaly_map, remark))
    looked = f"{len(fit.scores)} of {fit.images}" if len(fit.scores) < fit.images else fit.images
    training = detector.provenance["training"]
    picture = score_picture(
        {"training": fit.scores, "held out": calibration["scores"]},
        threshold,
        title=f"{dataset.name}: how well the good parts fit",
        lines=[
            f"EfficientAD-{detector.size}, schedule {training['schedule']}. Scores of {looked} "
            "images trained on and of those held out, on which the threshold rests:",
            f"{trust_sentence(calibration, 'held-out images')}.",
        ],
        cards=cards,
        cards_title="Training images that fit worst: is a bad part among them?",
    )
    where = picture_beside(options.out)
    save_picture(picture, where)
    print(f"picture: {where}")


def _spreads(quantiles: list[float]) -> str:
    """q_b - q_a of both maps, of qa_st, qb_st, qa_ae, qb_ae."""
    qa_st, qb_st, qa_ae, qb_ae = quantiles
    return f"student-teacher {qb_st - qa_st:.4g}, autoencoder {qb_ae - qa_ae:.4g}"


class _Course:
    """Shows where a training is going.

    On a terminal a live line: step, time left, the last loss, and the last held-out q_b - q_a where
    one was measured. Everywhere a line per entry of the history.

    resumed: the first call of `progress` is that of the step from which the training goes on.
    """

    def __init__(self, steps: int, resumed: bool, bars: Bars) -> None:
        self.steps, self._resumed, self._bars = steps, resumed, bars
        self._last: tuple[int, float] | None = None
        self._loss = self._spread = ""

    def progress(self, what: str, done: int, total: int) -> None:
        """The `progress` of `fit`."""
        if self._resumed:
            self._resumed = False
            print(f"resumed at step {done}", flush=True)
        if what != "training":
            self._bars(what, done, total)
            return
        if self._last is None:
            self._last = done, time.monotonic()
        if self._bars.terminal:  # elsewhere the history tells of the steps
            self._bars(what, done, total, f"{self._loss}{self._spread}")

    def entry(self, entry: dict[str, Any]) -> None:
        """The `on_history` of `fit`: a line with the speed and the time that is left."""
        now, step = time.monotonic(), entry["step"]
        self._loss = f"loss {entry['loss']:.4f}"
        line = f"step {step}/{self.steps}  {self._loss}"
        for term in ("hard", "penalty", "autoencoder", "student_autoencoder"):
            if term in entry:
                line += f"  {term.replace('_', '-')} {entry[term]:.4f}"
        if self._last is not None and step > self._last[0]:
            speed = (step - self._last[0]) / (now - self._last[1])
            left = round((self.steps - step) / speed)
            line += (
                f"  {speed:.2f} steps/s  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
            )
        self._last = step, now
        print(line, flush=True)
        if "metrics" in entry:
            qa_st, qb_st, qa_ae, qb_ae = entry["quantiles"]
            self._spread = f"  q_b-q_a {qb_st - qa_st:.3g}, {qb_ae - qa_ae:.3g}"
            spreads = _spreads(entry["quantiles"])
            print(
                f"  image AU-ROC {entry['metrics']['image AU-ROC']}  q_b - q_a {spreads}",
                flush=True,
            )
