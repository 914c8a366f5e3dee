"""The kernel benchmark: its counts, its rows, its sweeps, and that what is wrong gets no time."""

from __future__ import annotations

import os
import types

import pytest
import torch

from bench import shapes
from bench.kernels import case as kernel_case
from bench.kernels import cases, correctness, measure, roofline
from bench.kernels.ceilings import Ceilings
from efficientad.ops import fused

CEILINGS = Ceilings({"float32": 0.1, "float16": 0.1}, 10.0)
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="runs the kernels in Triton's interpreter"
)


def layer(name: str, size: str = "S"):
    return next(x for x in cases.layers(size, parts=1, small=True) if x.name == name)


# ---- counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "total", "paper"), [("S", 75.4, 75.9), ("M", 233.3, 235.4)])
def test_the_layers_are_the_whole_network(size, total, paper):
    """Shapes alone: their operations sum to the count of the roofline, which tests hold to hand."""
    made = [x.case("meta", 2, torch.float16) for x in cases.layers(size)]
    assert sum(c.flop for c in made) == 2 * sum(shapes.network_flop(size).values())
    assert sum(c.flop for c in made) / 2e9 == pytest.approx(total, abs=0.05)
    assert shapes.paper_gflop(size) == pytest.approx(paper, abs=0.05)
    assert {c.operation for c in made} == set(fused.OPERATIONS)


def test_shapes_are_those_that_the_next_layer_reads():
    shapes = {x.name: x.case("meta", 1, torch.float16).arguments for x in cases.layers("M")}
    assert shapes["pack"][0].shape == (1, 256, 256, 3)
    assert shapes["conv2"][0][1].shape == (1, 126, 126, 256)
    assert shapes["conv5"][0][0].shape == (1, 59, 59, 512)
    assert [w.shape[0] for w in shapes["conv5"][1]] == [384, 768]
    assert [t.shape[3] for t in shapes["pair"][:3]] == [384, 768, 64]
    assert shapes["e1"][0].shape == (1, 256, 256, 4)
    assert shapes["bottleneck"][0].shape == (1, 8, 8, 64)
    assert shapes["d6"][0].shape == (1, 64, 64, 64)
    assert shapes["d6"][3] == (127, 127)
    assert shapes["map"][0].shape == (3, 1, 56, 56)


def test_bytes_count_every_tensor_once():
    case = layer("conv1").case("cpu", 2, torch.float32)
    x, weight, bias = case.arguments
    got = case.definition()
    tensors = [x, *weight, *bias, *got]
    assert case.nbytes(got) == sum(t.numel() * 4 for t in tensors)
    grouped = layer("conv3").case("cpu", 1, torch.float32)
    assert grouped.nbytes([]) == sum(t.numel() * 4 for part in grouped.arguments for t in part)


@pytest.mark.parametrize("size", ["S", "M"])
def test_ours_and_plain_torch_compute_the_definition(size):
    for one in cases.layers(size, parts=1, small=True):
        case = one.case("cpu", 2, torch.float32)
        want = case.definition()
        for backend in ("torch", "eager", "channels_last"):
            _, got = measure.prepare(case, backend)
            assert len(got) == len(want)
            _, wrong = measure.fault(case, got, want, backend)
            assert wrong is None, (one.name, backend)


def test_errors_are_parts_of_the_greatest_value_and_nan_is_infinite():
    case = layer("conv3").case("cpu", 1, torch.float32)
    want = case.definition()
    scale = float(want[0].abs().max())
    got = [t.clone() for t in want]
    got[0][0, 0, 0, 0] += 0.5 * scale
    greatest, rms = case.errors(got, want)
    assert greatest == pytest.approx(0.5)
    assert rms == pytest.approx(0.5 / got[0].numel() ** 0.5)
    got[1][0, 0, 0, 0] = torch.nan
    assert case.errors(got, want)[0] == float("inf")
    with pytest.raises(ValueError, match="has shape"):
        case.errors([t[:, :1] for t in got], want)


def test_rows_of_the_sixth_decoder_layer_that_nobody_reads_do_not_count():
    case = layer("d6").case("cpu", 1, torch.float32)
    want = case.definition()
    read = case.needed[0].tolist()
    unread = next(i for i in range(want[0].shape[1]) if i not in read)
    got = [want[0].clone()]
    got[0][:, unread] = torch.nan
    assert case.errors(got, want) == (0.0, 0.0)
    got[0][:, read[0], read[0]] = torch.nan
    assert case.errors(got, want)[0] == float("inf")


# ---- rows ----------------------------------------------------------------------------------------


def test_a_row_holds_what_was_measured():
    case = layer("conv2").case("cpu", 1, torch.float32)
    rows = measure.measure(case, "cpu", ("torch", "eager"), CEILINGS, seconds=0.01)
    ours, eager = rows
    place = {k: ours[k] for k in ("kind", "name", "size", "layer", "batch", "dtype", "backend")}
    assert place == {"kind": "kernel", "name": "conv_relu_pool", "size": "S", "layer": "conv2",
                     "batch": 1, "dtype": "float32", "backend": "torch"}  # fmt: skip
    assert ours["tflops"] == pytest.approx(case.flop / ours["us"] / 1e6, rel=0.01)
    nbytes = case.nbytes(case.definition())
    assert ours["gb_s"] == pytest.approx(nbytes / ours["us"] / 1e3, rel=0.01)
    floor = max(case.flop / 0.1e6, nbytes / 10e3)
    assert ours["fraction_of_ceiling"] * ours["us"] == pytest.approx(floor, rel=0.01)
    assert eager["ratio"] == pytest.approx(eager["us"] / ours["us"], rel=0.01)
    assert "ratio" not in ours
    assert ours["no_time"] is None
    assert ours["small"]


def test_what_is_wrong_or_fails_gets_no_time(monkeypatch):
    genuine = kernel_case.Case.plain_torch

    def broken(self, channels_last, wrap=lambda f: f):
        if channels_last:
            raise RuntimeError("out of memory\nsecond line")
        call, got = genuine(self, channels_last, wrap)
        return call, [t * 1.01 for t in got]

    monkeypatch.setattr(kernel_case.Case, "plain_torch", broken)
    case = layer("conv3").case("cpu", 1, torch.float32)
    backends = ("torch", "eager", "channels_last")
    ours, eager, channels_last = measure.measure(case, "cpu", backends, CEILINGS, seconds=0)
    assert ours["us"] > 0
    assert eager["us"] is None
    assert eager["no_time"].startswith("wrong: greatest and RMS error 1.0e-02")
    assert channels_last["us"] is None
    assert channels_last["no_time"] == "RuntimeError: out of memory"
    assert "ratio" not in eager


def test_torch_compile_gets_the_same_expression(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: compiled.append((f, dynamic)) or f)
    case = layer("conv3").case("cpu", 1, torch.float32)
    rows = measure.measure(case, "cpu", ("torch", "compile"), CEILINGS, seconds=0)
    assert [(f.__name__, dynamic) for f, dynamic in compiled] == [("conv_relu", False)]
    assert rows[1]["us"] > 0


def test_keys_are_unique_and_shared_layers_are_measured_once():
    found = [key for key, _ in measure.measurements("cpu", lambda: CEILINGS, small=True)]
    assert len(found) == len(set(found)) == 3 * (18 + 6)
    assert found[0] == "kernel/pack/SM/pack/b1/float32"
    assert sum("/d6/" in key for key in found) == 3
    sizes = ("S",)
    some = measure.measurements(
        "cpu", lambda: CEILINGS, sizes=sizes, batches=(1,), keep=lambda x: x.name == "pair",
        small=True, seconds=0, kind="compiled",
    )  # fmt: skip
    ((key, run),) = some
    assert key == "compiled/pair_distance/S/pair/b1/float32"
    assert [row["backend"] for row in run()] == ["torch", "eager", "channels_last"]


# ---- sweeps and correctness, in the interpreter --------------------------------------------------


@interpreted
def test_a_sweep_checks_every_tile_and_says_which_does_not_run():
    from bench.kernels import sweeps
    from efficientad.kernels import pair_distance

    one = next(x for x in cases.layers("S", small=True) if x.name == "pair")
    case = one.case("cpu", 1, torch.float16)
    tiles = (sweeps.PAIR[0], sweeps.PAIR[-1], sweeps.Tile(48, 128, 128, warps=4, stages=3))
    rows = sweeps.measure(case, "cpu", tiles, CEILINGS)
    assert [row["tile"] for row in rows] == [
        "128x128x128B", "64x128x128B", "128x384x128B", "48x128x128B",
    ]  # fmt: skip
    assert [row["shipped"] for row in rows] == [True, False, False, False]
    shipped = pair_distance.choose_tile(90, 25, 384)
    assert (rows[0]["warps"], rows[0]["stages"]) == (shipped.warps, shipped.stages)
    assert all(row["no_time"] is None and row["max_error"] < 1e-3 for row in rows[:3])
    assert rows[3]["no_time"] is not None
    assert all(row["us"] is None and "not timed" in row["note"] for row in rows)


@interpreted
def test_a_fusion_is_compared_with_its_parts():
    from bench.kernels import sweeps

    case = layer("bottleneck").case("cpu", 2, torch.float16)
    *_, parts = sweeps.measure(case, "cpu", (), CEILINGS)
    assert (parts["tile"], parts["warps"], parts["no_time"]) == ("unfused", None, None)


@interpreted
def test_a_resize_is_compared_with_one_of_its_own():
    from bench.kernels import sweeps

    case = layer("d3").case("cpu", 1, torch.float16)
    tiles = (sweeps.RESIZE[0], sweeps.Apart(16, 64, 128, warps=4, stages=4))
    rows = sweeps.measure(case, "cpu", tiles, CEILINGS)
    assert {row["tile"].split()[0] for row in rows} == {"16x64x128B", "apart"}
    assert all(row["no_time"] is None and row["max_error"] < 2e-3 for row in rows)


def test_bytes_from_l2_are_those_of_the_static_model():
    from bench.kernels import sweeps
    from efficientad.kernels import conv, pair_distance

    launches = {launch.name: launch for launch in roofline.pdn_launches("S", 1)}
    by_name = {x.name: x.case("meta", 1, torch.float16) for x in cases.layers("S")}
    for name, tile, results in (
        ("conv2", conv.choose_tile(90, 61**2, (256, 256), True), [torch.empty(1, 61, 61, 256)] * 2),
        ("conv3", conv.choose_tile(90, 59**2, (256, 256), False), [torch.empty(1, 59, 59, 1)]),
        ("pair", pair_distance.choose_tile(90, 56**2, 384), [torch.empty(3, 1, 56, 56)]),
    ):
        launch = launches["pair+d8" if name == "pair" else name]
        expected = sum(group.bytes for group in launch.groups)
        assert sweeps.l2_bytes(by_name[name], tile, results) == expected, name
    assert sweeps.l2_bytes(by_name["e1"], tile, results) is None


@interpreted
def test_an_operation_is_checked_at_odd_sizes_with_poisoned_outputs(monkeypatch):
    row = correctness.check_operation("conv_relu_pool", "cpu", torch.float16, 5, small=True)
    assert (row["ok"], row["cases"], row["error"]) == (True, 2, None)
    assert 0 < row["max_error"] < 2e-3
    genuine = kernel_case.operators.kernel

    def lazy(name):  # leaves its last image unwritten, as a grid that is too small would
        kernel = genuine(name)

        def run(x, weight, bias, out=None, **options):
            if out is None:
                return kernel(x, weight, bias, **options)
            kernel(x, weight, bias, out=[torch.empty_like(t) for t in out], **options)
            return out

        return run

    monkeypatch.setattr(kernel_case.operators, "kernel", lazy)
    row = correctness.check_operation("conv_relu_pool", "cpu", torch.float16, 5, small=True)
    assert not row["ok"]
    assert "configuration 0, seed 5: error inf" in row["error"]


def test_a_predictor_is_checked_against_the_float32_detector(monkeypatch):
    class Fake:
        offset, backend = 0.0, "folded torch network"

        def __init__(self, detector, **options):
            self.facts = {"backend": self.backend, "reason": "none"}
            self.engine = types.SimpleNamespace(backend=None)

        def __call__(self, batch):
            maps = torch.stack([torch.from_numpy(f).float().mean(2) / 255 for f in batch])
            out = type("Out", (), {})()
            out.anomaly_map, out.score = maps + self.offset, maps.amax((1, 2))
            return out

    def detector(images):
        return type("Out", (), {"anomaly_map": images.mean(1)})()

    monkeypatch.setattr(correctness, "FastPredictor", Fake)
    monkeypatch.setattr(correctness, "_detector", lambda size: detector)
    check = correctness.check_predictor
    row = check("S", torch.float32, "cpu", 3)
    assert (row["ok"], row["cases"], row["size"]) == (True, 2, "S")
    Fake.offset = 1e-3
    row = check("S", torch.float32, "cpu", 3)
    assert not row["ok"]
    assert row["error"].startswith("anomaly map")
    on_cuda = check("S", torch.float16, "cuda", 3)
    assert on_cuda["error"] == "the kernels are not used: none"
