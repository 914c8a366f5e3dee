"""The benchmark for users: what is timed, in which order, what is refused a time, the command."""

from __future__ import annotations

import json
import math
import re

import helpers
import numpy as np
import pytest
import torch
from helpers_timing import Clock, thin_networks

from efficientad import FastPredictor, Prediction, save
from efficientad.benchmark import cold_start
from efficientad.benchmark import contenders as benchmark_rows
from efficientad.benchmark.call_times import SUMMARY, in_turn, ratio, summary
from efficientad.benchmark.contenders import (
    ACCURACY,
    ROW,
    Contender,
    accuracy,
    contender,
    groups,
    line,
    race,
    reference,
    row,
)
from efficientad.benchmark.end_to_end import benchmark, defaults, encoded, predictor_run
from efficientad.benchmark.stages import REPEATS, _by_events, stages
from efficientad.cli.main import main
from efficientad.data.decoding import read_image

KEYS = {"kind", "name", "size", "batch", "image_size", "dtype", "device", "p50_ms", "p90_ms",
        "p99_ms", "max_ms", "mean_ms", "spread_ms", "images_per_s", "map_error", "rank_errors",
        "calls"}  # fmt: skip
TIMES = ("p50_ms", "p90_ms", "p99_ms", "max_ms", "mean_ms", "spread_ms", "images_per_s", "calls")


@pytest.fixture(scope="module")
def thin():
    with thin_networks():
        yield


@pytest.fixture(scope="module")
def model(thin):
    return helpers.detector()


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    monkeypatch.setattr("efficientad.benchmark.end_to_end.IMAGES", 3)


# ---- times -----------------------------------------------------------------------------------


def test_percentiles_of_known_numbers():
    ms = [float(x) for x in range(1, 101)]
    found = summary([ms[50:], ms[:50]], images=16)
    assert tuple(found) == SUMMARY
    assert found == {
        "p50_ms": 50.5,
        "p90_ms": 90.1,
        "p99_ms": 99.01,
        "max_ms": 100.0,
        "mean_ms": 50.5,
        "spread_ms": 49.5,
        "images_per_s": 316.83,
        "calls": 100,
    }


def test_percentiles_equal_numpys():
    ms = np.random.default_rng(0).gamma(2, 3, 997)
    found = summary(np.array_split(ms, 10), images=3)
    assert found["p50_ms"] == pytest.approx(np.median(ms), abs=1e-4)
    assert found["p90_ms"] == pytest.approx(np.percentile(ms, 90), abs=1e-4)
    assert found["p99_ms"] == pytest.approx(np.percentile(ms, 99), abs=1e-4)
    assert found["spread_ms"] == pytest.approx(np.subtract(*np.percentile(ms, [75, 25])), abs=1e-4)
    assert found["images_per_s"] == pytest.approx(3 * 997 / ms.sum() * 1e3, abs=1e-2)


def test_ratio_is_the_median_of_the_rounds():
    slower = [[2.0, 2.0, 90.0], [40.0, 40.0], [9.0]]  # a busy second round slows both
    faster = [[1.0], [10.0, 10.0, 10.0], [3.0, 3.0]]
    assert ratio(slower, faster) == {"ratio": 3.0, "ratio_spread": 1.0, "rounds": 3}


def test_functions_take_turns_and_only_counted_calls_count(clock):
    functions = {"a": clock.spending(1, "a"), "b": clock.spending(3, "b")}
    times = in_turn(functions, warmup=2, calls=7, rounds=3)
    order = ["a"] * 2 + ["b"] * 2  # warm-up
    order += ["a"] * 3 + ["b"] * 3 + ["b"] * 2 + ["a"] * 2 + ["a"] * 2 + ["b"] * 2
    assert clock.calls == order
    assert [len(block) for block in times["a"].rounds] == [3, 2, 2]
    assert times["a"].all() == pytest.approx([1] * 7)
    assert times["b"].all() == pytest.approx([3] * 7)
    assert times["a"].warmup == 2


def test_the_first_call_of_a_long_block_is_not_counted(clock):
    times = in_turn({"a": clock.spending(1, "a")}, warmup=1, calls=20, rounds=2)
    assert len(times["a"].all()) == 20
    assert len(clock.calls) == 1 + 2 * (1 + 10)


def test_a_slow_function_gets_fewer_calls_in_the_seconds_given(clock):
    functions = {"slow": clock.spending(100), "fast": clock.spending(1)}
    times = in_turn(functions, warmup=1000, calls=1000, rounds=10, seconds=4)
    assert len(times["fast"].all()) == 1000
    assert times["fast"].warmup == 1000
    assert times["slow"].warmup == 10  # a quarter of four seconds
    assert len(times["slow"].all()) == 30
    assert clock.now <= 4 + 2.1
    clock.now = 0.0
    times = in_turn({"slow": clock.spending(5000)}, warmup=9, calls=9, rounds=9, seconds=1)
    assert [len(times["slow"].rounds), times["slow"].warmup] == [2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calls": 0}, "calls is 0; it must be at least 1"),
        ({"warmup": 0}, "warmup is 0; it must be at least 1"),
        ({"rounds": -1}, "rounds is -1; it must be at least 1"),
        ({"seconds": 0}, "seconds is 0; it must be more than 0"),
        ({"seconds": math.nan}, "seconds is nan"),
    ],
)
def test_counts_out_of_range(changes, message):
    with pytest.raises(ValueError, match=message):
        in_turn({"a": lambda: None}, **{"warmup": 1, "calls": 1} | changes)
    with pytest.raises(ValueError, match="functions is empty"):
        in_turn({}, warmup=1, calls=1)


def test_the_papers_counts_on_cuda_and_few_on_a_cpu():
    assert defaults(torch.device("cuda"))["warmup"] == 1000
    assert defaults(torch.device("cuda"))["calls"] == 1000
    assert defaults(torch.device("cpu"))["calls"] <= 20


# ---- accuracy --------------------------------------------------------------------------------


def known(scores=(0.0, 1.0, 2.0)) -> tuple[torch.Tensor, torch.Tensor]:
    maps = torch.zeros(3, 4, 4)
    maps[:, 1, 1] = torch.tensor(scores)
    return torch.tensor(scores), maps


def test_errors_are_parts_of_the_maps_scale():
    scores, maps = known()
    found = maps.clone()
    found[0, 0, 0] += 0.01
    judged = accuracy(scores + 0.004, found, (scores, maps), torch.float16)
    assert judged.map_error == pytest.approx(0.005)
    assert judged.map_rms == pytest.approx(0.005 / math.sqrt(48), rel=1e-3)
    assert judged.score_error == pytest.approx(0.002)
    assert (judged.rank_errors, judged.problem) == (0, None)
    small = known((0.0, 0.01, 0.02))
    assert accuracy(small[0], small[1] + 0.001, small, torch.float16).map_error == pytest.approx(
        0.01, rel=1e-3
    )


@pytest.mark.parametrize(
    ("change", "dtype", "message"),
    [
        (lambda s, m: (s, m + 0.03), torch.float16, r"wrong: map error 0\.015 .*bound 0\.01"),
        (lambda s, m: (s + 0.03, m), torch.float16, r"score error 0\.015 \(bound 0\.01\)"),
        (lambda s, m: (s, m + 0.01), torch.float16, r"RMS 0\.005 \(bound 0\.002\)"),
        (lambda s, m: (s, m + 0.001), torch.float32, r"bound 0\.0001"),
        (lambda s, m: (s.flip(0), m), torch.float16, "3 pairs in another order"),
        (lambda s, m: (s * math.nan, m), torch.float16, "not finite"),
        (lambda s, m: (s, m / 0), torch.float16, "not finite"),
        (lambda s, m: (s[:, None], m), torch.float16, r"shapes \(3, 1\)"),
    ],
)
def test_what_is_wrong(change, dtype, message):
    scores, maps = known()
    judged = accuracy(*change(scores, maps), (scores, maps), dtype)
    assert judged.problem.startswith("wrong: ")
    assert re.search(message, judged.problem)


def test_fp8_has_no_bound_here_but_its_order_is_counted():
    scores, maps = known()
    judged = accuracy(scores.flip(0), maps + 0.5, (scores, maps), torch.float8_e4m3fn)
    assert judged.problem is None
    assert judged.map_error == pytest.approx(0.25)
    assert judged.rank_errors == 3
    nan = accuracy(scores, maps * math.nan, (scores, maps), torch.float8_e4m3fn)
    assert "not finite" in nan.problem


def test_reference_is_the_plain_detector(model):
    frames = helpers.frames(2)
    scores, maps = reference(model, frames)
    with torch.no_grad():
        out = model(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)
    assert (scores - out.score).abs().max() <= 1e-6
    assert (maps - out.anomaly_map).abs().max() <= 1e-6
    _, other = reference(model, frames, "anomalib")
    inside = (slice(None), slice(30, -30), slice(30, -30))
    assert (other[inside] - maps[inside]).abs().max() <= 1e-6
    assert (other - maps)[:, 0].abs().max() > 1e-3
    assert model.border == "nelson"


# ---- contenders ------------------------------------------------------------------------------


def test_groups_hold_every_image_and_are_full():
    assert [g.tolist() for g in groups(np.arange(5), 2)] == [[0, 1], [2, 3], [4, 0]]
    assert groups(["a", "b"], 3) == [["a", "b", "a"]]


def fake(kind: str, name: str, error: float, clock, ms: float) -> Contender:
    """A contender at batch 2 whose map is off by `error` and whose call takes `ms`."""
    scores, maps = known()
    spend = clock.spending(ms)

    def run(part):
        spend()
        return scores[part], maps[part] + error

    shared = {"size": "S", "batch": 2, "image_size": [4, 4], "dtype": "float16", "device": "cpu"}
    images = torch.arange(3)
    return contender(row(kind, name, **shared), run, images, (scores, maps), torch.float16)


def test_a_wrong_contender_gets_no_time(clock):
    field = [
        fake("end_to_end", "ours", 0.0, clock, 2),
        fake("peer", "right", 0.001, clock, 6),
        fake("peer", "wrong", 0.1, clock, 1),
    ]
    rows = race(field, warmup=1, calls=4, rounds=2)
    ours, right, wrong, found = rows
    assert all(set(ROW) <= set(r) for r in rows)
    assert wrong["no_time"].startswith("wrong: map error 0.05")
    assert (wrong["wrong"], "wrong" in right, "wrong" in ours) == (True, False, False)
    assert wrong["map_error"] == pytest.approx(0.05)
    assert all(wrong[name] is None for name in TIMES)
    assert (ours["p50_ms"], right["p50_ms"], ours["calls"]) == (2.0, 6.0, 4)
    assert ours["images_per_s"] == 1000.0
    assert (found["kind"], found["against"], found["ratio"]) == ("ratio", "right", 3.0)
    assert (found["ratio_spread"], found["rounds"]) == (0.0, 2)


def test_without_a_right_one_there_is_no_race(clock):
    field = [fake("end_to_end", "ours", 0.1, clock, 2), fake("peer", "peer", 0.0, clock, 6)]
    rows = race(field, warmup=1, calls=4)
    assert [r["kind"] for r in rows] == ["end_to_end", "peer"]
    assert rows[0]["p50_ms"] is None
    assert race(field[:1], warmup=1, calls=4)[0]["no_time"]


def test_lines_show_what_there_is(clock):
    field = [fake("end_to_end", "ours", 0.0, clock, 2), fake("peer", "peer", 0.1, clock, 6)]
    field.append(fake("peer", "other", 0.0, clock, 5))
    lines = [line(r) for r in race(field, warmup=1, calls=4, rounds=2)]
    assert "2.000" in lines[0]
    assert "no time: wrong" in lines[1]
    assert "vs other" in lines[3]
    assert "2.50x" in lines[3]


# ---- benchmark -------------------------------------------------------------------------------


def test_rows_of_a_detector(model):
    rows = benchmark(
        model, batch_sizes=(1, 3), warmup=1, calls=2, rounds=2, plain=True, frame_size=(300, 400)
    )
    assert [(r["kind"], r["batch"]) for r in rows] == [
        *(("end_to_end", 1), ("peer", 1), ("ratio", 1)),
        *(("end_to_end", 3), ("peer", 3), ("ratio", 3)),
        *[("frame", 1)] * 3,
    ]
    for r in rows:
        assert set(r) >= KEYS
        assert r["no_time"] is None
        assert r["image_size"] == [256, 256]
        if r["kind"] != "ratio":
            assert r["p50_ms"] > 0
            assert (r["calls"], r["warmup"], r["rank_errors"]) == (2, 1, 0)
            assert 0 <= r["map_error"] <= 5e-2
            assert r["images_per_s"] == pytest.approx(1e3 * r["batch"] / r["mean_ms"], rel=1e-3)
    assert rows[0]["map_size"] == [256, 256]
    assert rows[0]["backend"].startswith("folded torch network")
    assert [r["decode"] for r in rows[6:]] == [None, "jpeg", "png"]
    assert {tuple(r["frame_size"]) for r in rows[6:]} == {(300, 400)}
    json.dumps(rows, allow_nan=False)


def test_a_predictor_alone_has_no_accuracy(model, monkeypatch):
    predictor = FastPredictor(model, device="cpu")
    calls = []
    host = Prediction.cpu
    monkeypatch.setattr(Prediction, "cpu", lambda self: calls.append(self) or host(self))
    (found,) = benchmark(predictor, batch_sizes=[1], warmup=1, calls=3, rounds=1)
    assert [found[name] for name in ACCURACY] == [None] * 4
    assert found["p50_ms"] > 0
    assert len(calls) == 4  # every call ends on the host
    with pytest.raises(ValueError, match="plain is set and model is a predictor"):
        benchmark(predictor, plain=True)


def test_a_predictor_with_other_weights_gets_no_time(model):
    predictor = FastPredictor(helpers.detector(seed=1), device="cpu")
    rows = benchmark(predictor, detector=model, batch_sizes=[1], warmup=1, calls=1, plain=True)
    assert [r["kind"] for r in rows] == ["end_to_end", "peer"]
    assert rows[0]["no_time"].startswith("wrong")
    assert rows[0]["p50_ms"] is None
    assert rows[1]["p50_ms"] > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_sizes": []}, r"batch_sizes is \[\]"),
        ({"batch_sizes": [1, 0]}, r"batch_sizes is \[1, 0\]"),
        ({"decode": ("webp",)}, r"decode is \('webp',\)"),
        ({"decode": "png"}, "decode is 'png'; it must be a list"),
        ({"frame_size": (0, 5)}, r"frame_size is \(0, 5\)"),
        ({"calls": 0}, "calls is 0"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"dtype": "float12"}, "dtype is 'float12'"),
    ],
)
def test_bad_arguments(model, changes, message):
    with pytest.raises(ValueError, match=message):
        benchmark(model, **changes)


def test_encoded_frames_are_the_frames():
    frames = helpers.frames(2, 40, 50)
    assert np.array_equal(read_image(encoded(frames, "png")[1]), frames[1])
    jpeg = read_image(encoded(frames, "jpeg")[1])
    assert 0 < abs(jpeg.astype(int) - frames[1]).mean() < 12


def test_run_gives_host_tensors_of_the_batch(model):
    run = predictor_run(FastPredictor(model, device="cpu"))
    frames = helpers.frames(2)
    scores, maps = run(frames)
    one, one_map = run(frames[1:])
    assert (tuple(scores.shape), tuple(maps.shape)) == ((2,), (2, 256, 256))
    assert (tuple(one.shape), tuple(one_map.shape)) == ((1,), (1, 256, 256))
    assert one[0] == scores[1]


def test_stages_of_a_cpu(model):
    predictor = FastPredictor(model, device="cpu")
    rows = stages(predictor, calls=2, frame_size=(300, 400))
    assert [r["name"] for r in rows] == [
        *("frame path", "networks", "map", "copy out"),
        *("resize 400x300", "decode JPEG 400x300", "decode PNG 400x300"),
    ]
    for r in rows:
        assert set(r) >= KEYS
        assert (r["kind"], r["calls"], r["timing"]) == ("stage", 2, "clock")
        assert r["p50_ms"] > 0
    by_name = {r["name"]: r["p50_ms"] for r in rows}
    assert by_name["networks"] > by_name["frame path"]
    assert len(stages(predictor, calls=1, frame_size=None)) == 4
    with pytest.raises(ValueError, match=r"batch is 2; the predictor has buffers for \[1\]"):
        stages(predictor, 2)


def test_event_times_are_those_of_one_repeat(monkeypatch):
    """Of the two runs of each sample the second is timed; the first samples are left out."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")

        def synchronize(self):
            log.append("synchronize")

        def elapsed_time(self, end):
            return 1000.0 if log.count("synchronize") <= 3 else 40.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    found = _by_events(lambda: log.append("work"), samples=2, images=4)
    assert log == ["work", "record", "work", "record", "synchronize"] * 5
    assert (found["p50_ms"], found["max_ms"], found["calls"]) == (40 / REPEATS, 40 / REPEATS, 2)
    assert found["images_per_s"] == 2000.0
    assert (found["repeats"], found["timing"]) == (REPEATS, "events")


# ---- the command -----------------------------------------------------------------------------


@pytest.fixture
def cold(monkeypatch):
    """In the place of a fresh process, which knows no thin networks."""
    asked = []

    def start(detector, **options):
        asked.append(options)
        numbers = {"import_s": 1, "load_s": 2, "construction_s": 3, "first_call_ms": 4}
        shape = {"size": "S", "batch": 1, "image_size": [256, 256], "dtype": "float32"}
        return row("cold_start", "cold start", p50_ms=3004.0, **shape, **numbers)

    monkeypatch.setattr(cold_start, "cold_start", start)
    monkeypatch.setattr("efficientad.benchmark.end_to_end.CAMERA", (300, 400))
    monkeypatch.setattr("efficientad.benchmark.stages.CAMERA", (300, 400))
    return asked


def command(*arguments: object) -> int:
    return main(["benchmark", "--device", "cpu", *map(str, arguments)])


def test_the_command_prints_a_table_and_writes_json(thin, cold, tmp_path, capsys):
    path = tmp_path / "new" / "out.json"
    counts = ("--calls", 2, "--warmup", 1)
    assert command(*counts, "--batch-sizes", 1, 2, "--dtype", "float32", "--json", path) == 0
    printed = capsys.readouterr().out
    assert "weights: random (no MODEL was given)" in printed
    assert "runs: cpu, float32, folded torch network" in printed
    found = json.loads(path.read_text())
    assert set(found) == {"about", "rows"}
    assert found["about"]["weights"].startswith("random")
    assert found["about"]["torch"] == torch.__version__
    assert found["about"]["date"].startswith("20")
    kinds = [r["kind"] for r in found["rows"]]
    assert kinds == [
        *["end_to_end", "peer", "ratio"] * 2,
        *["frame"] * 3,
        *["stage"] * 7,
        "cold_start",
    ]
    assert {r["dtype"] for r in found["rows"]} == {"float32"}
    assert all(r["calls"] == 2 for r in found["rows"] if r["kind"] in ("end_to_end", "frame"))
    assert cold == [{"device": "cpu", "dtype": "float32"}]
    for r in found["rows"]:
        assert line(r) in printed


def test_the_command_times_a_file_without_the_plain_detector(model, cold, tmp_path, capsys):
    path, out = tmp_path / "model.safetensors", tmp_path / "out.json"
    save(model, path)
    counts = ("--calls", 1, "--warmup", 1, "--batch-sizes", 1)
    assert command(path, *counts, "--peers-free", "--json", out) == 0
    assert f"weights: {path}" in capsys.readouterr().out
    kinds = {r["kind"] for r in json.loads(out.read_text())["rows"]}
    assert kinds == {"end_to_end", "frame", "stage", "cold_start"}


def test_a_failed_fresh_process_costs_nothing_else(model, cold, tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "model.safetensors", tmp_path / "out.json"
    save(model, path)

    def fail(*_, **__):
        raise RuntimeError("the fresh process ended with 9: killed")

    monkeypatch.setattr(cold_start, "cold_start", fail)
    counts = ("--calls", 1, "--warmup", 1, "--batch-sizes", 1)
    assert command(path, *counts, "--peers-free", "--json", out) == 1
    assert "no cold start: the fresh process ended with 9: killed" in capsys.readouterr().err
    assert [r["kind"] for r in json.loads(out.read_text())["rows"]][-1] == "stage"


def test_the_command_says_by_its_exit_code_that_something_is_wrong(
    model,
    cold,
    tmp_path,
    capsys,
    monkeypatch,
):
    path, out = tmp_path / "model.safetensors", tmp_path / "out.json"
    save(model, path)
    monkeypatch.setitem(benchmark_rows.BOUNDS, torch.bfloat16, (1e-9, 1e-9))
    monkeypatch.setitem(benchmark_rows.BOUNDS, torch.float32, (1e-9, 1e-9))
    counts = ("--calls", 1, "--warmup", 1, "--batch-sizes", 1)
    assert command(path, *counts, "--peers-free", "--json", out) == 1
    assert "no time: wrong: map error" in capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [r["kind"] for r in rows] == ["end_to_end", *["frame"] * 3]
    assert all(r["p50_ms"] is None for r in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calls", 0), "--calls is 0; it must be at least 1"),
        (("--warmup", -1), "--warmup is -1; it must be at least 1"),
        (("--batch-sizes", 1, 0), "--batch-sizes is 1 0; it must be at least 1"),
        (("--dtype", "float12"), "dtype is 'float12'"),
        (("--dtype", "float16"), "dtype is float16 and the device a CPU"),
        (("--image-size", 200, 256), "image size is 200x256"),
        (("nowhere.safetensors",), "nowhere.safetensors"),
        (("nowhere.safetensors", "--size", "M"), "--size and --image-size are for random weights"),
    ],
)
def test_wrong_usage_gives_2(arguments, message, thin, capsys):
    assert command(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("efficientad benchmark: error: ")
