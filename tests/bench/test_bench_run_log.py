"""The log of `python -m bench.gpu`: the budget, what is kept, and what is withheld."""

from __future__ import annotations

import helpers_bench as made
import pytest

from bench import record
from bench.gpu import run_log
from bench.gpu.run_log import Budget, RunLog, run_all
from bench.report.format import source


class Clock:
    """Seconds that pass only when they are told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def log(folder, earlier=None, **changes) -> RunLog:
    return RunLog(folder / "results.json", made.about(**changes), earlier)


def takes(clock: Clock, seconds: float, *rows: dict):
    def measure() -> list[dict]:
        clock.now += seconds
        return list(rows)

    return measure


# ---- the budget ----------------------------------------------------------------------------------


def test_a_measurement_is_left_out_if_the_longest_of_its_kind_would_not_fit(tmp_path, monkeypatch):
    monkeypatch.setattr(run_log, "FIRST_GUESS", {"a": 1.0, "b": 2.0})
    clock, begun = Clock(), []
    budget = Budget(30.0, clock)
    seconds = {"a/1": 4, "a/2": 12, "a/3": 2, "b/1": 1, "a/4": 1, "b/2": 1, "new/1": 1}

    def measurement(key):
        def measure():
            begun.append(key)
            return takes(clock, seconds[key])()

        return key, measure

    found = log(tmp_path)
    run_all(map(measurement, seconds), found, budget)
    # After a/2 14 s are left and an "a" may take 12; after b/1 there are 11: no more "a". Of a kind
    # that is new and has no guess of its own, 10 s are assumed.
    assert begun == ["a/1", "a/2", "a/3", "b/1", "b/2"]
    assert record.read(found.path)["about"]["left_out"] == ["a/4", "new/1"]
    assert budget.left() == 30 - 20


def test_peers_that_compile_are_a_kind_of_their_own():
    assert run_log.kind_of("peer/S/256/float16/b1") == "peer"
    assert run_log.kind_of("peer/S/256/float16/b1/compile") == "peer-compile"
    assert run_log.kind_of("") == ""


def test_everything_is_on_disk_before_the_next_measurement(tmp_path):
    seen, clock = [], Clock()
    found = log(tmp_path)

    def look():
        rows = record.read(found.path)["rows"]
        seen.append([(row["key"], row["part"]) for row in rows])
        return [{"kind": "x", "value": float("nan")}]

    run_all([("x/1", look), ("x/2", look)], found, Budget(100, clock))
    assert seen == [[], [("x/1", 1)]]
    assert record.read(found.path)["rows"][1]["value"] is None


def test_a_measurement_that_raises_costs_only_itself(tmp_path):
    def broken():
        raise RuntimeError("no kernel image\nmore")

    lines, after = [], []
    found = log(tmp_path)
    run_all(
        [("x/1", broken), ("x/2", lambda: [{"kind": "x"}])],
        found,
        Budget(100),
        report=lines.append,
        after_error=lambda: after.append(1),
    )
    assert [row["kind"] for row in found.rows] == ["failure", "x"]
    assert found.rows[0]["error"] == "RuntimeError: no kernel image\nmore"
    assert lines[:2] == ["> x/1", "! x/1: RuntimeError: no kernel image"]
    assert after == [1]


def test_a_lost_device_ends_the_run_and_the_failure_is_kept(tmp_path):
    def lost():
        raise RuntimeError("an illegal memory access")

    found = log(tmp_path)
    with pytest.raises(RuntimeError, match="illegal"):
        run_all([("x/1", lost), ("x/2", lost)], found, Budget(100), after_error=lost)
    assert list(record.read(found.path)["about"]["keys"]) == ["x/1"]


# ---- resuming ------------------------------------------------------------------------------------


def test_only_a_log_can_be_resumed(tmp_path):
    record.write(tmp_path / "other.json", made.about(), [])
    with pytest.raises(ValueError, match=r"other.json is no results file of bench.gpu"):
        log(tmp_path, tmp_path / "other.json")


def test_a_second_call_takes_what_is_missing(tmp_path):
    first = log(tmp_path, command="first")
    run_all([("x/1", lambda: [{"kind": "x", "n": 1}])], first, Budget(100))
    first.leave_out("x/2")
    first.write()
    taken = []

    def take(key):
        return key, lambda: taken.append(key) or [{"kind": "x", "n": 2}]

    second = log(tmp_path, first.path, command="second")
    assert second.about["left_out"] == []
    run_all(map(take, ("x/1", "x/2")), second, Budget(100))
    assert taken == ["x/2"]
    found = record.read(second.path)
    assert [(row["key"], row["n"], row["part"]) for row in found["rows"]] == [
        ("x/1", 1, 1), ("x/2", 2, 2),
    ]  # fmt: skip
    assert [part["command"] for part in found["about"]["parts"]] == ["first", "second"]


@pytest.mark.parametrize("name", ["commit", "versions"])
def test_results_of_another_commit_are_not_mixed(tmp_path, name):
    first = log(tmp_path)
    with pytest.raises(ValueError, match=f"has {name}"):
        log(tmp_path, first.path, **{name: "other"})


def test_another_driver_goes_on_and_is_noted(tmp_path):
    first = log(tmp_path)
    run_all([("x/1", lambda: [{"kind": "x"}])], first, Budget(100))
    (tmp_path / "second").mkdir()
    second = log(tmp_path / "second", first.path, driver="2.0")
    assert list(second.keys) == ["x/1"]
    found = record.read(second.path)
    assert [part["driver"] for part in found["about"]["parts"]] == ["1.0", "2.0"]
    assert "NVIDIA H200, driver 1.0, driver 2.0, torch" in source(found)


def test_another_card_starts_its_own_rows(tmp_path):
    first = log(tmp_path)
    run_all([("x/1", lambda: [{"kind": "x", "n": 1}])], first, Budget(100))
    before = first.path.read_bytes()
    (tmp_path / "second").mkdir()
    second = log(tmp_path / "second", first.path, device="NVIDIA H100", commit="other")
    assert second.other_card == made.H200
    run_all([("x/1", lambda: [{"kind": "x", "n": 2}])], second, Budget(100))
    found = record.read(second.path)
    assert found["about"]["device"] == "NVIDIA H100"
    assert [(row["n"], row["part"]) for row in found["rows"]] == [(2, 1)]
    with pytest.raises(ValueError, match="was made on NVIDIA H200 and this card is NVIDIA H100"):
        log(tmp_path, first.path, device="NVIDIA H100")
    assert first.path.read_bytes() == before


# ---- what is wrong gets no speed -----------------------------------------------------------------


def wrong(name="conv_relu_pool", size=None, dtype="float16") -> dict:
    return {"kind": "correctness", "name": name, "size": size, "dtype": dtype, "ok": False,
            "error": "error 0.3"}  # fmt: skip


def test_the_padded_network_is_another_subject():
    row = wrong("forward", "S") | {"padding": True}
    assert run_log.failures([row]) == {("predictor S-padded", "float16")}
    assert run_log.failures([row | {"padding": False}]) == {("predictor S", "float16")}


@pytest.mark.parametrize("first", ["speed", "check"])
def test_a_kernel_that_failed_its_check_keeps_no_time(tmp_path, first):
    found = log(tmp_path)
    rows = [made.kernel(), made.kernel(backend="eager"), made.kernel(name="conv_relu"),
            made.kernel(dtype="bfloat16"),
            made.kernel(kind="sweep", tile="64x128x128B", l2_tb_s=6.0)]  # fmt: skip
    adds = [("kernel/x", rows), ("correct/conv_relu_pool/float16", [wrong()])]
    for key, more in adds if first == "speed" else reversed(adds):
        found.add(key, more, 1.0)
    kept = {
        (r["name"], r["backend"], r["dtype"], r["kind"]): r
        for r in record.read(found.path)["rows"]
        if r["kind"] != "correctness"
    }
    for place, row in kept.items():
        held = place[0] == "conv_relu_pool" and place[1] == "triton" and place[2] == "float16"
        assert (row["us"] is None) == held, place
        assert (row["tflops"] is None) == held
        if held:
            assert row["no_time"] == "conv_relu_pool failed its correctness check in float16"
    assert kept["conv_relu_pool", "triton", "float16", "sweep"]["l2_tb_s"] is None


def test_a_predictor_that_failed_its_check_keeps_no_time(tmp_path):
    found = log(tmp_path)
    rows = [made.end_to_end(), made.end_to_end("M"), made.end_to_end(dtype="bfloat16"),
            made.stage("graph", 0.1), *made.peer("eager", 4.0)]  # fmt: skip
    found.add("peer/S", rows, 1.0)
    found.add("correct-network/predictor/S/float16", [wrong("predictor", "S")], 1.0)
    kinds = {(r["kind"], r["size"], r["dtype"]): r for r in found.rows if r["kind"] in
             ("end_to_end", "stage", "peer", "ratio")}  # fmt: skip
    ours, graph = kinds["end_to_end", "S", "float16"], kinds["stage", "S", "float16"]
    assert [ours[f"p{p}_ms"] for p in (50, 90, 99)] == [None] * 3
    assert ours["images_per_s"] is None
    assert ours["map_error"] == 1e-3
    assert graph["p50_ms"] is None
    assert kinds["ratio", "S", "float16"]["ratio"] is None
    assert kinds["peer", "S", "float16"]["p50_ms"] == 0.8
    assert kinds["end_to_end", "M", "float16"]["p50_ms"] == 0.2
    assert kinds["end_to_end", "S", "bfloat16"]["p50_ms"] == 0.2


def test_what_failed_or_crashed_in_its_check_is_not_tried(tmp_path):
    found = log(tmp_path)
    found.fail("correct/pair_distance/float16", "the process ended with -11")
    found.fail("correct-network/forward/M/float16", "no answer")
    found.fail("correct-network/forward/S-padded/float16", "no answer")
    assert run_log.failures(found.rows) == {
        ("pair_distance", "float16"), ("predictor M", "float16"), ("predictor S-padded", "float16"),
    }  # fmt: skip
    tried = []
    keys = [
        "kernel/pair_distance/S/pair/b1/float16",
        "sweep/pair_distance/S/pair/b1/float16",
        "kernel/pair_distance/S/pair/b1/bfloat16",
        "kernel/conv_relu/S/conv3/b1/float16",
        "stage/M/256/float16/b1",
        "stage/S/256/float16/b1",
        "peer/M/256/float16/b1",
    ]
    run_all([(k, lambda k=k: tried.append(k) or []) for k in keys], found, Budget(1000))
    assert tried == [*keys[2:4], *keys[5:]]
    refused = [row["no_time"] for row in found.rows if row["kind"] == "refused"]
    assert refused[0] == "pair_distance failed its correctness check in float16"
    assert len(refused) == 3
