"""When a low precision is earned: the rule, and what a file says of it."""

from __future__ import annotations

import json

import helpers
import numpy as np
import pytest
import torch

import efficientad as ead
from efficientad.model.precision import BOUND, FEWEST_IMAGES, compare, doubt, stored_precision

SCORES = [0.010, 0.020, 0.025, 0.030, 0.040, 0.045]
QUARTILES = float(np.subtract(*np.quantile(SCORES, (0.75, 0.25))))
SPREAD = min(float(np.std(SCORES)), QUARTILES)

pytestmark = pytest.mark.usefixtures("light_networks")


def moved(by: float) -> list[float]:
    return [SCORES[0], SCORES[1] - by, *SCORES[2:]]


def test_the_error_is_the_largest_and_the_spread_the_smaller_of_two():
    found = compare(SCORES, {"bfloat16": moved(0.003), "float16": SCORES}, 0.05, "cpu")
    assert found.errors == pytest.approx({"bfloat16": 0.003, "float16": 0.0})
    assert found.spread == pytest.approx(SPREAD)
    assert found.margin == pytest.approx(0.05 - 0.0275)
    assert found.images == len(SCORES)
    with_one_odd = compare([*SCORES, 90.0], {"float16": [*SCORES, 90.0]}, None, "cpu")
    assert with_one_odd.spread < 2 * SPREAD  # the standard deviation alone is 31
    assert with_one_odd.margin is None


@pytest.mark.parametrize(("share", "earned"), [(0.9 * BOUND, True), (1.1 * BOUND, False)])
def test_the_bound_on_the_spread(share, earned):
    found = compare(SCORES, {"bfloat16": moved(share * SPREAD)}, None, "cpu")
    problem = found.doubt(torch.bfloat16)
    assert (problem is None) == earned
    if problem is not None:
        assert f"up to {share * SPREAD:.2g}, {100 * share:.3g} % of their spread" in problem


def test_a_threshold_close_to_the_scores_asks_for_more():
    errors = {"bfloat16": moved(0.5 * BOUND * SPREAD)}
    assert compare(SCORES, errors, 0.05, "cpu").doubt(torch.bfloat16) is None
    near = compare(SCORES, errors, 0.0275 + 0.2 * SPREAD, "cpu").doubt(torch.bfloat16)
    assert near is not None
    assert "distance from the threshold" in near


def test_what_earns_nothing():
    few = SCORES[: FEWEST_IMAGES - 1]
    assert "4 held-out images" in compare(few, {"float16": few}, None, "cpu").doubt(torch.float16)
    nan = compare(SCORES, {"float16": moved(float("nan"))}, None, "cpu")
    assert "by up to nan" in nan.doubt(torch.float16)
    untried = compare(SCORES, {"float16": SCORES}, None, "cpu").doubt(torch.bfloat16)
    assert untried == "bfloat16 was not tried when the detector was calibrated, on cpu"
    alike = [0.5] * 6
    assert "more than all" in compare(alike, {"float16": moved(0)}, None, "cpu").doubt(
        torch.float16
    )


def test_a_file_keeps_it_and_what_does_not_fit_counts_as_not_measured(tmp_path):
    model = helpers.detector()
    assert stored_precision(model) is None
    assert "was not measured" in doubt(model, torch.bfloat16)
    assert doubt(model, torch.float32) is None
    found = compare(SCORES, {"bfloat16": SCORES, "float16": moved(float("inf"))}, 0.05, "cpu")
    model.provenance["calibration"] = {"precision": found.facts()}
    ead.save(model, tmp_path / "a.safetensors")
    again = ead.load(tmp_path / "a.safetensors")
    assert doubt(again, torch.bfloat16) is None
    assert doubt(again, torch.float16) is not None  # infinite there, not a number here
    facts = found.facts()
    for wrong in (
        None,
        [],
        "yes",
        {},
        facts | {"spread": "0.1"},
        facts | {"images": None},
        facts | {"margin": [1]},
        facts | {"errors": [0.0]},
    ):
        again.provenance["calibration"] = {"precision": json.loads(json.dumps(wrong))}
        assert stored_precision(again) is None, wrong
        assert doubt(again, torch.bfloat16) is not None
    again.provenance["calibration"] = {"precision": facts | {"errors": {"bfloat16": "0"}}}
    assert doubt(again, torch.bfloat16) is not None
