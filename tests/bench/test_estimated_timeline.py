"""The estimate against launches and graphs worked out by hand; its launches against the code."""

from __future__ import annotations

import json

import helpers_bench as made
import pytest

from bench import record as results
from bench import shapes
from bench.report import estimates, tables
from bench.timeline import cards, choices, facts, model, recording, run, work
from bench.timeline.cards import Card
from bench.timeline.model import Facts, Timed
from bench.timeline.work import Group

SMALL = Card("two SMs", sms=2, tensor=2e9, l2=2e9, l2_bytes=1000, hbm=1e9)  # 1 GFLOP/s, 1 GB/s each
PLAIN = Facts(registers=32, shared=1024)


@pytest.fixture(autouse=True)
def constants(monkeypatch):
    """Round numbers in place of the fitted ones."""
    values = {"GAP": 1.0, "START": 2.0, "TRIP": 3.0, "PROGRAM": 4.0, "EPILOGUE": 0.5, "COPY": 6.0,
              "RESIZE": 5.0, "RESIZE_AHEAD": 2.5, "GATHER": 2.0, "BLEND": 0.25, "EARLY": 0.5,
              "BESIDE": 2.0, "BESIDE_STRIDED": 4.0, "LARGER": 1.25, "PRIORITY": 0.8}  # fmt: skip
    for name, value in values.items():
        monkeypatch.setattr(cards, name, value)


@pytest.fixture(scope="module")
def detector():
    return recording.detector("S")


@pytest.fixture(scope="module")
def launches(detector):
    return recording.record(detector, 1)


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "fit"),
    [
        (157, 192 * 1024, 8, 1),
        (106, 32 * 1024, 8, 2),  # 112 registers are given: 28,672 a program
        (64, 24 * 1024, 4, 8),
        (32, 0, 1, 32),
        (16, 0, 8, 8),
        (40, 56 * 1024, 4, 4),  # 57 KiB each, with what every program takes
    ],
)
def test_programs_on_a_multiprocessor(registers, shared, warps, fit):
    assert model.occupancy(cards.H200, Facts(registers, shared), warps) == fit


def test_a_program_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="300000 bytes of shared memory does not fit"):
        model.occupancy(cards.H200, Facts(32, 300000), 4)


# A step of 8x8x10 is 1280 operations, 1.28 us of a multiprocessor, and 320 bytes, 0.32 us.
STEPS = Group(programs=1, steps=3, bm=8, bn=8, bk=10)


@pytest.mark.parametrize(
    ("group", "stages", "resident", "us", "bound"),
    [
        (STEPS, 3, 1, 4 + 32 + 3 * 3.0, "latency"),  # 6 us for two copies under way
        (STEPS, 1, 1, 4 + 32 + 3 * 6.0, "latency"),
        (STEPS, 3, 4, 4 + 32 + 3 * 5.12, "tensor"),
        (Group(1, 3, bm=8, bn=1, bk=1000), 3, 1, 4 + 4 + 3 * 18.0, "L2"),
        (Group(1, 3, bm=8, bn=8, bk=10, resized=True, blends=16), 1, 1, 4 + 32 + 15, "latency"),
        (Group(1, 3, bm=8, bn=8, bk=10, resized=True, blends=16), 2, 2, 4 + 32 + 24, "issue"),
        (Group(1, 1, bm=8, bn=8, bk=64, gathers=64), 1, 1, 128.0, "issue"),
        (Group(1, trips=2), 1, 1, 6.0, "latency"),
        (Group(1, trips=1, other_bytes=8000), 1, 1, 8.0, "L2"),
    ],
)
def test_a_program_by_hand(group, stages, resident, us, bound):
    causes = model.program_us(SMALL, group, stages, resident)
    assert sum(causes.values()) == pytest.approx(us)
    assert {name for name, part in causes.items() if part} == {"latency", bound}


def alone(*groups: Group, shared: int = 200 * 1024, **options) -> model.Alone:
    options = {"warps": 4, "stages": 1} | options
    return model.alone(SMALL, groups, Facts(32, shared), **options)


def test_a_launch_by_hand():
    found = alone(Group(5, trips=1))  # one at a time on each of two: three rounds
    assert (found.us, found.resident, found.waves) == (2 + 9, 1, 2.5)
    assert alone(Group(5, trips=1), shared=1024).us == 2 + 3  # three at once
    assert alone(Group(5, trips=1), early=True).us == 1 + 9
    long, short = Group(1, trips=4), Group(4, trips=1)
    assert alone(long, short).us == 2 + 12  # 12 beside 3, 3, 3, 3
    assert alone(short, long).us == 2 + 18  # 3, 3, then 12 last


def test_what_exceeds_the_cache_comes_from_memory():
    assert alone(Group(1, trips=1), tensors=1000).bound == "latency"
    found = alone(Group(1, trips=1), tensors=100_000)
    assert (found.us, found.bound) == (2 + 100, "HBM")


def launch(us: float, *waits: int, fills=False, slowed: float = 2.0, priority=False) -> Timed:
    return Timed(us, waits, 1.0, busy=us, fills=fills, slowed=slowed, priority=priority)


def test_two_streams_by_hand():
    """0, then 1 and 3 on the main stream, 2 on the branch, 4 after both."""
    graph = [launch(2), launch(10, 0), launch(4, 0), launch(3, 1), launch(1, 2, 3)]
    # 1 is the larger of two that run from 3 to 7, at 4/5 of its speed: 3.2 of 10 are done then.
    spans = model.simulate(graph)
    assert spans[:3] == [(0, 2), (3, pytest.approx(13.8)), (3, 7)]
    assert spans[3:] == [pytest.approx((14.8, 17.8)), pytest.approx((18.8, 19.8))]
    assert model.critical_path(graph, [end for _, end in spans]) == [0, 1, 3, 4]


def test_a_launch_that_fills_the_card_slows_the_smaller_one():
    graph = [launch(2), launch(10, 0, fills=True), launch(4, 0), launch(1, 1, 2)]
    assert model.simulate(graph)[2] == pytest.approx((3, 11))
    assert model.simulate(graph)[1] == pytest.approx((3, 3 + 8 + 10 - 6.4))
    graph[2] = launch(4, 0, slowed=4.0)  # 1 has ended after 12.5, and 7/8 are left of what is 4
    spans = model.simulate(graph)
    assert spans[1] == pytest.approx((3, 15.5))
    assert spans[2] == pytest.approx((3, 15.5 + 4 - 12.5 / 4))
    assert model.critical_path(graph, [end for _, end in spans]) == [0, 2, 3]


def test_a_launch_that_was_there_first_is_not_slowed():
    graph = [launch(2), launch(4, 0), launch(10, 0, fills=True)]
    assert model.simulate(graph)[1:] == [(3, 7), pytest.approx((3, 3 + 10 + 0.8))]


def test_two_that_fill_the_card_share_it():
    graph = [launch(2), launch(10, 0, fills=True), launch(8, 0, fills=True, priority=True)]
    assert model.simulate(graph)[2] == pytest.approx((3, 3 + 10))  # at 4/5 of its speed
    assert model.simulate(graph)[1] == pytest.approx((3, 13 + 10 - 2))


def test_launches_that_wait_for_each_other_are_refused():
    with pytest.raises(ValueError, match="wait for each other"):
        model.simulate([launch(1, 1), launch(1, 0)])


def test_the_recording_is_the_codes_graph(launches):
    place = {launch.layer: i for i, launch in enumerate(launches)}
    assert {"pack", "e5", "e6", "d1", "d7", "conv3", "pair", "map", "score"} <= place.keys()
    assert len(place) == len(launches)
    waits = {launch.layer: [launches[i].layer for i in launch.waits] for launch in launches}
    assert (waits["pack"], waits["e1"], waits["conv1"]) == ([], ["pack"], ["pack"])
    assert waits["d1"] == ["e6"]
    assert waits["pair"] == ["conv3"]
    assert sorted(waits["autoencoder distance"]) == ["d7", "pair"]
    assert waits["score"] == ["map"]
    branch = [launch.layer for launch in launches if launch.stream == recording.BRANCH]
    assert (branch[0], branch[-1]) == ("e1", "d7")
    assert launches[place["conv2"]].programs == 234


def test_choices_change_the_recording_and_leave_nothing_behind(detector, launches):
    known = choices.choices(90)
    with choices.chosen(known["measured"]):
        measured = {launch.layer: launch for launch in recording.record(detector, 1)}
    assert [measured[n].programs for n in ("conv1", "d2", "d6", "pair")] == [994, 6, 392, 150]
    assert "autoencoder distance" not in measured
    with choices.chosen(known["early"]):
        early = recording.record(detector, 1)
    by_stream = {(launch.stream, launch.early) for launch in early}
    assert by_stream == {(recording.MAIN, False), (recording.BRANCH, True)}
    with pytest.raises(KeyError), choices.chosen(known["pool"]):
        raise KeyError
    again = recording.record(detector, 1)
    assert [(x.layer, x.programs, x.stages) for x in again] == [
        (x.layer, x.programs, x.stages) for x in launches
    ]


def test_the_work_is_that_of_the_network(launches):
    flop = sum(group.programs * group.flop for x in launches for group in work.groups(x))
    needed = sum(shapes.network_flop("S").values())
    assert needed < flop < 1.15 * needed  # tiles' spare rows, and the fourth channel
    moved = {x.layer: work.tensors(x) for x in launches}
    assert moved["conv2"] == 2 * (2 * 126**2 * 128 + 512 * 2048 + 2 * 61**2 * 256) + 4 * 512


def test_a_kernel_that_is_not_known_is_refused():
    other = recording.Recorded("x", test_one_stream, 0, (), 1, {}, 4, 1, False)
    with pytest.raises(ValueError, match="does not know test_one_stream"):
        work.groups(other)


@pytest.mark.parametrize("size", ["S", pytest.param("M", marks=pytest.mark.slow)])
def test_every_launch_is_a_case_of_the_census(size):
    detector = recording.detector(size)
    compiled = []

    def compile_case(case, arch):
        compiled.append((case.kernel, case.config))
        return {"registers": 64, "shared_bytes": arch, "spill_stores": 1, "spill_loads": 2}, b""

    known: facts.Known = {}
    for choice in choices.choices(90).values():
        with choices.chosen(choice):
            found = facts.compiled(recording.record(detector, 1), 90, known, compile_case)
        assert set(found) == {Facts(64, 90, 3)}
    assert len(compiled) == len(known)
    assert ("conv_relu_pool", f"{size} plain conv2 128x256x64") in compiled


def test_a_launch_that_the_census_forgot_is_named(launches):
    with pytest.raises(ValueError, match=r"no case for pack \(_pack_kernel\)"):
        facts.case_of(launches[0], [])


def test_the_command_says_that_it_estimates(tmp_path, capsys):
    trace = [
        [0.0, 2.0, "_pack_kernel", 1, [1, 1, 1], 26, 0],
        [3.0, 5.0, "_score_kernel", 1, [1, 1, 1], 9, 0],
    ]
    row = {"variant": "base", "size": "S", "batch": 1, "trace": trace}
    results.write(tmp_path / run.REPLAYS, made.about(), [row])
    kernel = made.kernel("conv2", us=50.0)
    results.write(tmp_path / run.ALONE, made.about(), [kernel])
    out = tmp_path / "e.json"
    arguments = ["--size", "S", "--card", "H200", "H100", "--json", str(out), "--results"]
    assert run.main([*arguments, str(tmp_path)], lambda found: [PLAIN] * len(found)) == 0
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert text.strip() == tables.TABLES["estimate"](found)
    assert found["about"]["device"].startswith("ESTIMATE for one NVIDIA H200 or H100")
    assert {row["kind"] for row in found["rows"]} == {"estimate"}
    heads = [part for part in text.split("\n\n") if not part.startswith("|")]
    assert len(heads) == 3
    assert all(head.startswith("Estimate") for head in heads)
    assert text.count("| estimate of a replay, us") == 1
    assert "8.00 us measured" in heads[2]
    shipped = [r for r in found["rows"] if r["choice"] == "shipped"]
    assert [r["card"] for r in shipped] == ["H200", "H100"]
    last = max(x["start_us"] + x["us"] for x in shipped[0]["launches"])
    assert shipped[0]["us"] == pytest.approx(last, abs=0.1)
    (measured,) = (r for r in found["rows"] if r.get("measured_us"))
    alone = {x["layer"]: (x["measured_us"], x["measured_alone_us"]) for x in measured["launches"]}
    assert (alone["pack"], alone["conv2"]) == ((2.0, None), (None, 50.0))


def test_one_stream(launches):
    row = run.estimate("S", 1, cards.H200, launches, [PLAIN] * len(launches), streams=choices.ONE)
    alone_us = sum(x["alone_us"] for x in row["launches"])
    assert row["us"] == pytest.approx(alone_us + cards.GAP * (len(launches) - 1), abs=0.3)
    assert all(x["waited"] for x in row["launches"])


def test_the_trunk_without_the_branch(launches):
    row = run.estimate("S", 1, cards.H200, launches, [PLAIN] * len(launches), streams=choices.TRUNK)
    main = [x["alone_us"] for x in row["launches"] if x["stream"] == recording.MAIN]
    assert row["us"] == pytest.approx(sum(main) + cards.GAP * (len(main) - 1), abs=0.3)


def test_bad_arguments_are_named(capsys):
    with pytest.raises(SystemExit):
        run.main(["--batch", "0"])
    assert "--batch is 0; it must be at least 1" in capsys.readouterr().err
    with pytest.raises(ValueError, match="images is 0; it must be at least 1"):
        recording.record(None, 0)


def test_the_aim_is_met_or_missed_by_a_number():
    row = {"size": "M", "batch": 1, "card": "H200", "us": 400.0, "choice": "shipped", "name": "x",
           "kind": "estimate", "launches": []}  # fmt: skip
    text = estimates.estimate_table({"rows": [row]})
    assert "The aim of 380 us is missed by 20.0 us." in text
    assert "is met." in estimates.estimate_table({"rows": [row | {"us": 380.0}]})
    assert "aim" not in estimates.estimate_table({"rows": [row | {"batch": 8}]})
    assert estimates.estimate_table({"rows": []}) == "(nothing measured)"
