"""The commands `efficientad judge` and `efficientad drift`: stored scores, no network."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from efficientad.cli.common import EXIT_ANOMALY, EXIT_OK, UsageError, print_notes

if TYPE_CHECKING:
    from efficientad.evaluation.drift import Comparison, Drift
    from efficientad.results.stored_scores import Judgement, StoredScores

_LISTED = 20  # images whose verdict changes


def add_judge(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser(
        "judge",
        help="judge stored scores by another threshold, without a network",
        description="Judge the scores of an earlier `predict` or `evaluate` by another threshold. "
        "Nothing is computed again; the run's own files stay as they are.",
    )
    command.add_argument("results", type=Path, help="its output folder, scores.json or scores.csv")
    command.add_argument("--threshold", type=float, required=True, help="the new one")
    command.add_argument(
        "--out",
        type=Path,
        help="folder for scores.csv, scores.json and scores.png; default: judged beside the scores",
    )


def run_judge(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from efficientad.results.score_picture import save_picture, score_picture
    from efficientad.results.stored_scores import judge, read_scores, write_judged

    stored = read_scores(options.results)
    found = judge(stored, options.threshold)
    out = options.out or stored.file.parent / "judged"
    write_judged(out, stored, found)
    _print_judgement(stored, found)
    own = "unknown" if stored.threshold is None else f"{stored.threshold:.4g}"
    picture = score_picture(
        stored.by_kind(),
        found.threshold,
        title=f"{stored.file.parent.resolve().name}: scores judged again",
        lines=[f"{sum(found.anomalous)} of {len(stored.images)} images are anomalous by the "
               f"threshold {found.threshold:.4g}. The run's own: {own}."],
    )  # fmt: skip
    where = out / "scores.png"
    save_picture(picture, where)
    print(f"written: {out / 'scores.json'}, {out / 'scores.csv'}, {where}")
    return EXIT_OK


def _print_judgement(stored: StoredScores, found: Judgement) -> None:
    """The threshold and what it judges, a row per kind of image, the images judged otherwise."""
    from efficientad.model.image_score import score_notes
    from efficientad.results.prediction import is_anomalous
    from efficientad.results.report_page import KINDS
    from efficientad.utils.proportions import CONFIDENCE, upper_bound

    before = "the run's own is unknown"
    if stored.threshold is not None:
        before = f"the run's own is {stored.threshold:.6g}"
    print(f"threshold {found.threshold:.6g}; {before}")
    for note in score_notes(stored.score_rule or "max"):
        print(f"{note} The threshold must be one of such scores.")
    for label, kind in KINDS:
        mine = [
            verdict
            for image, verdict in zip(stored.images, found.anomalous, strict=True)
            if image.label == label
        ]
        if not mine:
            continue
        count, of = sum(mine), len(mine)
        line = f"{kind:<10}  {of:>6} images  {count:>6} anomalous ({count / of:.1%})"
        if label == 1:
            line += f", {of - count} missed"
        if label == 0:
            bound = 100 * upper_bound(count, of)
            line += f"; with {CONFIDENCE:.0%} confidence at most {bound:.2g}% of such parts are"
        print(line)
    if stored.threshold is None:
        return
    print(f"verdicts that change: {len(found.changed)}")
    for image in found.changed[:_LISTED]:
        now = "anomalous" if is_anomalous(image.score, found.threshold) else "normal"
        print(f"  {image.score:.6g}  {image.path}  now {now}")
    if len(found.changed) > _LISTED:
        print(f"  and {len(found.changed) - _LISTED} more")


def add_drift(commands: argparse._SubParsersAction) -> None:
    """Add the command's parser to those of the command line."""
    command = commands.add_parser(
        "drift",
        help="compare a stretch of production scores with the calibration's",
        description="Say whether stored scores and map means still look like those of the "
        "calibration, by Kolmogorov-Smirnov tests of the images below the threshold, and since "
        "when not. The order of "
        "the images is that of the file, for `predict` on a folder that of their names.",
    )
    command.add_argument("results", type=Path, help="output folder, scores.json or scores.csv")
    command.add_argument("model", help="the detector file that gave the scores")
    command.add_argument("--picture", type=Path, metavar="PNG", help="draw both histograms")
    command.add_argument("--fail-on-drift", action="store_true", help="exit with 3 on drift")


def run_drift(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from efficientad.checkpoint.loading import load
    from efficientad.evaluation.drift import find_drift
    from efficientad.model.image_score import described
    from efficientad.model.trust import calibration_of
    from efficientad.results.score_picture import save_picture, score_picture
    from efficientad.results.stored_scores import read_scores

    stored = read_scores(options.results)
    detector = load(options.model, verify=False)  # of which no map is computed
    calibration = calibration_of(detector.provenance)
    if calibration is None:
        raise UsageError(
            f"{options.model} holds no scores of a calibration; run `efficientad calibrate "
            f"{options.model} GOOD_IMAGES`, and `predict` with the file that comes of it"
        )
    if stored.score_rule is not None and stored.score_rule != detector.score:
        raise UsageError(
            f"a score in {stored.file} is the {described(stored.score_rule)}, one of "
            f"{options.model} the {described(detector.score)}; they do not compare. Score the "
            "images anew with this detector"
        )
    if stored.threshold is not None and stored.threshold != detector.threshold:
        print_notes([f"the scores were judged by {stored.threshold:.6g} and the detector's "
                     f"threshold is {detector.threshold}; scores of another detector do not "
                     "compare"])  # fmt: skip
    scores = [image.score for image in stored.images]
    means = [image.map_mean for image in stored.images]
    found = find_drift(scores, calibration, detector.threshold, map_means=means)
    if found.score is not None and found.map_mean is None:
        without = options.model if calibration.map_means is None else stored.file
        print_notes([f"scores alone are compared: {without} holds no map means"])
    _print_drift(stored, found)
    if options.picture is not None:
        known = calibration.scores
        groups = {"calibration": known, "production": scores}
        if found.since is not None:
            groups = {"calibration": known, "before": scores[: found.since],
                      "since": scores[found.since :]}  # fmt: skip
        picture = score_picture(
            groups,
            detector.threshold,
            title=f"{stored.file.parent.resolve().name}: scores beside the calibration's",
            lines=[_verdict(stored, found)],
        )
        save_picture(picture, options.picture)
        print(f"picture: {options.picture}")
    return EXIT_ANOMALY if found.drifted and options.fail_on_drift else EXIT_OK


def _print_drift(stored: StoredScores, found: Drift) -> None:
    print(
        f"{found.images} images, {found.above} above the threshold "
        f"({found.above / found.images:.1%}); as many good parts would be with a chance of "
        f"{found.above_chance:.2g}"
    )
    if found.score is None:
        print(
            f"below it are {found.compared}, too few to be compared with the calibration's "
            f"{found.reference}"
        )
    else:
        print(f"below it: {found.compared}, compared with the calibration's {found.reference}:")
        for name, one in _figures(found).items():
            print(
                f"  {name:<10}  distance {one.distance:.3f}, p-value {one.p_value:.2g}, median "
                f"{one.medians[1]:.4g} against {one.medians[0]:.4g}"
            )
    print(_verdict(stored, found))
    if found.drifted is None:
        print("look at the images: bad parts, or another light", file=sys.stderr)


def _figures(found: Drift) -> dict[str, Comparison]:
    """What is compared, by its name in a sentence."""
    pairs = {"score": found.score, "map's mean": found.map_mean}
    return {name: one for name, one in pairs.items() if one is not None}


def _verdict(stored: StoredScores, found: Drift) -> str:
    if found.drifted is None:
        return "no verdict on drift: nearly all scores are above the threshold"
    if found.since is None:
        return "no drift"
    of = " and ".join(name for name, one in _figures(found).items() if one.since is not None)
    path = stored.images[found.since].path
    return f"drift of the {of} since image {found.since + 1} of {found.images}, {path}"
