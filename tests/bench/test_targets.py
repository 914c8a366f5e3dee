"""The speed targets: met, missed or not measured, and never guessed."""

from __future__ import annotations

import helpers_bench as made
import pytest

from bench.report import targets
from bench.report.targets import MET, MISSED, OPEN, TARGETS, evaluate, targets_table

BY_NAME = {t.name: t for t in TARGETS}
GPU = [t for t in TARGETS if t.machine == targets.H200]
(ON_CPU,) = [t for t in TARGETS if t.machine == targets.CPU]
COMPILED = "torch.compile max-autotune"


def judge(name: str, rows: list[dict], device: str = made.H200, **about) -> targets.Verdict:
    return evaluate(BY_NAME[name], [("h200.json", {"about": made.about(device, **about),
                                                   "rows": rows})])  # fmt: skip


# Target, rows that just meet it, rows that just miss it, the value met.
CASES = [
    ("S, batch 1: time on the GPU",
     [made.stage("graph", 0.150)], [made.stage("graph", 0.151)], 0.150),
    ("M, batch 1: time on the GPU",
     [made.stage("graph", 0.4, "M")], [made.stage("graph", 0.41, "M")], 0.4),
    ("S, batch 1: host to host, p50",
     [made.end_to_end(p50_ms=0.25)], [made.end_to_end(p50_ms=0.26)], 0.25),
    ("S, batch 16: throughput", [made.end_to_end(batch=16, images_per_s=7000.0)],
     [made.end_to_end(batch=16, images_per_s=6999.0)], 7000),
    ("M, batch 16: throughput", [made.end_to_end("M", 16, images_per_s=2300.0)],
     [made.end_to_end("M", 16, images_per_s=2299.0)], 2300),
    ("S, batch 16, fp8: throughput",
     [made.end_to_end("S", 16, "float8_e4m3fn", images_per_s=10000.0)],
     [made.end_to_end("S", 16, "float8_e4m3fn", images_per_s=9999.0)], 10000),
    # 75.4 GFLOP an image against 790 TFLOP/s: 7,340 images/s are 70 %.
    ("S, batch 32, end to end: share of the bfloat16 ceiling",
     [*made.ceilings(), made.end_to_end(batch=32, images_per_s=7340.0)],
     [*made.ceilings(), made.end_to_end(batch=32, images_per_s=7330.0)], 0.7004),
    ("M, batch 32, end to end: share of the bfloat16 ceiling",
     [*made.ceilings(), made.end_to_end("M", 32, images_per_s=2372.0)],
     [*made.ceilings(), made.end_to_end("M", 32, images_per_s=2369.0)], 0.7004),
    ("S, batch 1: times as fast as the fastest peer",
     [*made.peer("eager", 4.0), *made.peer(COMPILED, 1.5)],
     [*made.peer("eager", 1.4), *made.peer(COMPILED, 1.5)], 1.5),
    ("S, batch 32: times as fast as the fastest peer",
     [*made.peer(COMPILED, 1.3, "S", 32)], [*made.peer(COMPILED, 1.29, "S", 32)], 1.3),
    ("M, batch 1: times as fast as the fastest peer",
     [*made.peer(COMPILED, 1.5, "M")], [*made.peer(COMPILED, 1.4, "M")], 1.5),
    ("M, batch 32: times as fast as the fastest peer",
     [*made.peer(COMPILED, 1.3, "M", 32)], [*made.peer(COMPILED, 1.2, "M", 32)], 1.3),
    ("S, batch 1: p99 over p50", [made.end_to_end(p50_ms=0.2, p99_ms=0.22)],
     [made.end_to_end(p50_ms=0.2, p99_ms=0.221)], 1.1),
    ("M, batch 1: p99 over p50", [made.end_to_end("M", p50_ms=0.4, p99_ms=0.44)],
     [made.end_to_end("M", p50_ms=0.4, p99_ms=0.45)], 1.1),
]  # fmt: skip


@pytest.mark.parametrize(("name", "enough", "short", "value"), CASES, ids=[c[0] for c in CASES])
def test_met_missed_and_not_measured(name, enough, short, value):
    found = judge(name, enough)
    assert (found.status, found.file) == (MET, "h200.json")
    assert found.value == pytest.approx(value, rel=1e-3)
    assert judge(name, short).status == MISSED
    assert judge(name, []).status == OPEN
    other = judge(name, enough, "NVIDIA H100 80GB HBM3")
    assert (other.status, other.note) == (OPEN, "that is NVIDIA H100 80GB HBM3")
    assert other.value == pytest.approx(value, rel=1e-3)
    on_cpu = [{**row, "device": "cpu"} for row in enough if row["kind"] != "ceiling"]
    assert judge(name, on_cpu, "CPU").status == OPEN


def test_every_target_is_tested_and_reads_rows_that_exist():
    assert {name for name, *_ in CASES} == {t.name for t in GPU}
    assert len(BY_NAME) == len(TARGETS)
    for target in TARGETS:
        reads = [target.read, *([target.over] if target.over else [])]
        for read in reads:
            assert read.where["kind"] in ("end_to_end", "stage", "ratio", "ceiling")


def test_the_numbers_are_those_that_were_promised():
    limits = {t.name: (t.rule, t.limit, t.unit) for t in TARGETS}
    assert limits["S, batch 1: time on the GPU"] == ("<=", 0.150, "ms")
    assert limits["S, batch 1: host to host, p50"] == ("<=", 0.250, "ms")
    assert limits["S, batch 16: throughput"] == (">=", 7000, "images/s")
    assert limits["S, batch 16, fp8: throughput"] == (">=", 10000, "images/s")
    assert limits["M, batch 1: time on the GPU"] == ("<=", 0.400, "ms")
    assert limits["M, batch 16: throughput"] == (">=", 2300, "images/s")
    assert limits["S, batch 32, end to end: share of the bfloat16 ceiling"][:2] == (">=", 0.70)
    assert limits["S, batch 1: times as fast as the fastest peer"][:2] == (">=", 1.5)
    assert limits["S, batch 32: times as fast as the fastest peer"][:2] == (">=", 1.3)
    assert limits["S, batch 1: p99 over p50"][:2] == ("<=", 1.1)
    assert (ON_CPU.rule, ON_CPU.limit) == (">=", 2.5)


def test_on_a_cpu_the_fastest_dtype_counts():
    slow = made.peer("nelson1425 order, eager", 1.8, device="cpu", dtype="float32")
    fast = made.peer("nelson1425 order, eager", 2.6, device="cpu", dtype="bfloat16")
    rows = [*slow, *fast, *made.peer("channels_last", 1.2, device="cpu")]
    found = judge(ON_CPU.name, rows, "Some CPU, 2 cores")
    assert (found.status, found.value) == (MET, 2.6)
    assert judge(ON_CPU.name, slow, "Some CPU, 2 cores").status == MISSED
    assert judge(ON_CPU.name, made.peer("nelson1425 order, eager", 4.0)).status == OPEN


def test_without_the_strongest_peer_the_fastest_is_unknown():
    found = judge("S, batch 1: times as fast as the fastest peer", made.peer("eager", 4.0))
    assert (found.status, found.note) == (OPEN, "the peer max-autotune is missing")


def test_withheld_times_are_not_measured_and_say_why():
    rows = [made.end_to_end(batch=16, images_per_s=None, no_time="wrong: map error 0.3")]
    found = judge("S, batch 16: throughput", rows)
    assert (found.status, found.value, found.note) == (OPEN, None, "wrong: map error 0.3")


def test_of_several_rows_the_worst_counts():
    rows = [made.end_to_end(batch=16, images_per_s=v) for v in (7100.0, 6900.0)]
    assert judge("S, batch 16: throughput", rows).value == 6900
    pairs = [made.end_to_end(p50_ms=a, p99_ms=b) for a, b in ((0.2, 0.21), (0.3, 0.36))]
    assert judge("S, batch 1: p99 over p50", pairs).value == pytest.approx(1.2)


def test_other_sizes_dtypes_and_image_sizes_do_not_count():
    for values in ({"dtype": "bfloat16"}, {"size": "M"}, {"image_size": [512, 512]}, {"batch": 8}):
        rows = [made.end_to_end(batch=16, images_per_s=9000.0) | values]
        assert judge("S, batch 16: throughput", rows).status == OPEN


def test_the_newest_file_with_an_answer_counts():
    target = BY_NAME["S, batch 16: throughput"]

    def file(name: str, date: str, *rows: dict, device: str = made.H200):
        return name, {"about": made.about(device, date=date), "rows": list(rows)}

    old = file("old", "2026-01-01", made.end_to_end(batch=16, images_per_s=6000.0))
    new = file("new", "2026-01-02", made.end_to_end(batch=16, images_per_s=8000.0))
    h100 = file("h100", "2026-01-03", made.end_to_end(batch=16, images_per_s=9000.0),
                device="NVIDIA H100")  # fmt: skip
    empty = file("empty", "2026-01-04")
    for files in ([old, new, h100, empty], [empty, h100, new, old]):
        found = evaluate(target, files)
        assert (found.status, found.file, found.value) == (MET, "new", 8000)
    assert evaluate(target, [h100, empty]).file == "h100"


def test_the_table_and_the_command(tmp_path, capsys):
    from bench import record

    found = made.results()
    record.write(tmp_path / "h200.json", found["about"], found["rows"])
    (tmp_path / "list.json").write_text("[]")
    files = sorted(tmp_path.glob("*.json"))
    assert targets.main([str(path) for path in files]) == 0
    table = capsys.readouterr().out
    verdicts = targets.all_verdicts(targets.read_results(files))
    assert table.strip() == targets_table(verdicts)
    line = next(x for x in table.splitlines() if x.startswith("| S, batch 1: host to host"))
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [
        "<= 0.250 ms", "0.200", "met", "h200.json",
    ]  # fmt: skip
    assert len(table.splitlines()) == len(TARGETS) + 2
