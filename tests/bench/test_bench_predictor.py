"""The end-to-end benchmark: peers give our numbers or get no time, and what comes when."""

from __future__ import annotations

import itertools
import json
import types
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers_timing import thin_networks
from torch import Tensor, nn

from bench import record
from bench.predictor import measurements as bench_measurements
from bench.predictor import peers, peers_packages, peers_torch
from bench.predictor import run as bench_predictor
from bench.predictor.measurements import Bench
from bench.predictor.options import DEFAULTS
from bench.predictor.run import measurements, options, plan, run
from efficientad.benchmark.contenders import ACCURACY, as_images, row
from efficientad.data.image_files import find_images
from efficientad.fast.options import choose_dtype
from efficientad.model.networks import PDN, Autoencoder

CPU = torch.device("cpu")
KEYS = {"kind", "name", "size", "batch", "image_size", "dtype", "device", "p50_ms", "p90_ms",
        "p99_ms", "max_ms", "mean_ms", "spread_ms", "images_per_s", "map_error", "rank_errors",
        "calls"}  # fmt: skip
FEW = {"calls": 2, "warmup": 1, "rounds": 2, "images": 3, "frame_size": (270, 300)}
NELSON, LAST = peers.NELSON, "channels_last"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    chosen = options("cpu", dtypes=("float32",), image_sizes=(256,), batches=(1, 2), **FEW)
    with thin_networks():
        yield Bench(chosen, tmp_path_factory.mktemp("exported"))


def answers(bench: Bench, peer: peers.Peer) -> tuple[Tensor, Tensor]:
    return peer.run(peer.prepare(as_images(bench.frames(256))))


# ---- options and order -----------------------------------------------------------------------


def test_defaults_of_a_cpu():
    found = options("cpu")
    assert found.dtypes[0] == str(choose_dtype("auto", CPU, "auto")).split(".")[1]
    assert "float32" in found.dtypes
    assert ("bfloat16" in found.dtypes) == peers_torch.cpu_multiplies_bfloat16()
    assert (found.sizes, found.image_sizes, found.batches) == (("S", "M"), (256, 512), (1, 4))
    assert (found.compile, found.peers) == (False, None)
    assert found.calls <= 20
    assert options("cpu", calls=7, sizes=["M"], batches=None).calls == 7
    assert options("cpu", sizes=["M"]).sizes == ("M",)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": ("L",)}, "size is 'L'"),
        ({"sizes": ()}, "sizes is empty"),
        ({"batches": (0,)}, r"batch_sizes is \(0,\)"),
        ({"image_sizes": (200,)}, "image size is 200x200"),
        ({"dtypes": ("float12",)}, "dtypes has 'float12'"),
        ({"calls": 0}, "calls is 0"),
        ({"images": 0}, "images is 0"),
        ({"peers": ("tensorrt",)}, "peers has 'tensorrt'; there are 'nelson1425 order, eager'"),
        ({"colour": 1}, "no such option: colour"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        options("cpu", **changes)


def on_cuda() -> bench_predictor.Options:
    """The defaults of a GPU, where there may be none."""
    values = vars(options("cpu")) | DEFAULTS["cuda"]
    return bench_predictor.Options(**values | {"device": torch.device("cuda:0"), "compile": True})


def test_the_order_on_a_gpu():
    keys = [key for key, _ in measurements(on_cuda())]
    assert len(set(keys)) == len(keys)
    assert keys == [key for key, _ in measurements(on_cuda())]
    assert keys[:3] == ["peer/S/256/float16/b1", "stage/S/256/float16/b1", "peer/S/256/float16/b16"]
    place = {key: i for i, key in enumerate(keys)}
    order = (
        "peer/M/256/float16/b32",
        "end_to_end/S/256/float8_e4m3fn/b16",
        "peer/S/256/float16/b1/compile",
        "frame/S/256/float16",
        "cold_start/M/256/float16",
        "end_to_end/S/256/float16/b64",
        "end_to_end/M/512/float16/b16",
        "end_to_end/M/256/bfloat16/b64",
    )
    assert sorted(order, key=place.__getitem__) == list(order)
    for size, batch in itertools.product("SM", (1, 2, 4, 8, 16, 32, 64)):
        for dtype in ("float16", "bfloat16", "float8_e4m3fn"):
            found = {f"{kind}/{size}/256/{dtype}/b{batch}" for kind in ("peer", "end_to_end")}
            assert len(found & set(keys)) == 1
        assert f"end_to_end/{size}/512/float16/b{batch}" in place


def test_the_order_on_a_cpu():
    keys = [key for key, _ in measurements(options("cpu", dtypes=("bfloat16", "float32")))]
    assert keys[0] == "peer/S/256/bfloat16+float32/b1"
    assert "end_to_end/M/512/bfloat16+float32/b1" in keys
    assert not any("compile" in key for key in keys)
    compiled = [(kind, name) for kind, name, _ in plan(options("cpu", compile=True))]
    assert compiled.count(("peer", "compile")) == 2
    none = plan(options("cpu", compile=True, peers=(NELSON,)))
    assert ("peer", "compile") not in [(kind, name) for kind, name, _ in none]


# ---- peers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["S", "M"])
@pytest.mark.parametrize("name", [NELSON, LAST])
def test_torch_peers_give_the_detectors_numbers(name, size, made):
    place = peers.Place(CPU, 1, made.folder)
    peer = peers.build(name, made.detector(size, 256), place)
    scores, maps = answers(made, peer)
    expected = made.expected(size, 256)
    assert (scores - expected[0]).abs().max() <= 1e-5
    assert (maps - expected[1]).abs().max() <= 1e-5
    layout = torch.channels_last if name == LAST else torch.contiguous_format
    assert peer.prepare(torch.rand(2, 3, 256, 256)).is_contiguous(memory_format=layout)


def test_the_sequence_is_the_published_one(made):
    module = peers_torch.NelsonOrder(made.detector("S", 256), torch.float32, CPU)
    convolutions = [
        [i for i, layer in enumerate(part) if isinstance(layer, nn.Conv2d)]
        for part in (module.teacher, module.autoencoder)
    ]
    assert convolutions[0] == [0, 3, 6, 8]
    assert len(convolutions[1]) == 14
    assert not any(p.requires_grad for p in module.parameters())


def test_peers_do_not_share_the_detectors_weights(made):
    detector = made.detector("S", 256)
    module = peers_torch.NelsonOrder(detector, torch.bfloat16, CPU)
    assert detector.student.conv1.weight.dtype == torch.float32
    assert module.student[0].weight.dtype == torch.bfloat16
    assert module.quantiles.dtype == torch.float32


def test_cudnns_benchmark_is_put_back(made, monkeypatch):
    seen = []
    forward = peers_torch.NelsonOrder.forward

    def spy(self, x):
        seen.append(torch.backends.cudnn.benchmark)
        return forward(self, x)

    monkeypatch.setattr(peers_torch.NelsonOrder, "forward", spy)
    place = peers.Place(CPU, 1, made.folder)
    for before in (True, False):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        for name in (NELSON, LAST):
            answers(made, peers.build(name, made.detector("S", 256), place))
            assert torch.backends.cudnn.benchmark == before
    assert seen == [False, True, False, True]


class Anomalib(nn.Module):
    """What anomalib's EfficientAdModel is from outside; written from its documentation."""

    def __init__(self, teacher_out_channels, model_size, padding, pad_maps):
        super().__init__()
        assert (teacher_out_channels, padding, pad_maps) == (384, False, True)
        self.teacher, self.student = PDN(model_size, 384), PDN(model_size, 768)
        self.ae = Autoencoder()
        zeros = {name: torch.zeros(1, 384, 1, 1) for name in ("mean", "std")}
        self.mean_std = nn.ParameterDict(zeros)
        names = ("qa_st", "qb_st", "qa_ae", "qb_ae")
        self.quantiles = nn.ParameterDict({name: torch.tensor(0.0) for name in names})

    def forward(self, image):
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406),
                                                              (0.229, 0.224, 0.225)))  # fmt: skip
        x = (image - mean) / std
        teacher = (self.teacher(x) - self.mean_std["mean"]) / self.mean_std["std"]
        student = self.student(x)
        st = (teacher - student[:, :384]).square().mean(1, keepdim=True)
        ae = (self.ae(x) - student[:, 384:]).square().mean(1, keepdim=True)
        combined = 0
        for kind, one in (("st", st), ("ae", ae)):
            one = F.interpolate(F.pad(one, (4,) * 4), image.shape[-2:], mode="bilinear")
            low, high = (self.quantiles[f"q{end}_{kind}"] for end in "ab")
            combined = combined + 0.5 * 0.1 * (one - low) / (high - low)
        return InferenceBatch(combined.amax((2, 3)), combined)


class InferenceBatch(NamedTuple):
    pred_score: Tensor
    anomaly_map: Tensor


def test_anomalib_is_judged_by_its_own_border_rule(made, monkeypatch):
    library = types.SimpleNamespace(
        EfficientAdModel=Anomalib, EfficientAdModelSize=types.SimpleNamespace(S="S", M="M")
    )
    monkeypatch.setattr(peers_torch.importlib.util, "find_spec", lambda name: library)
    monkeypatch.setattr(peers_packages.importlib, "import_module", lambda name: library)
    found = made.peer("anomalib", "S", 256, 2).row
    assert found["no_time"] is None
    assert found["map_error"] <= 1e-5
    expected = made.expected("S", 256)[1]
    assert (made.expected("S", 256, border="anomalib")[1] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["anomalib", "onnxruntime", "OpenVINO", "OpenVINO bfloat16"])
def test_a_missing_package_is_said(name, made, monkeypatch):
    monkeypatch.setattr(peers_torch.importlib.util, "find_spec", lambda name: None)
    rows = made.compare("S", 256, (), 1, (name,))
    assert [r["no_time"] for r in rows] == ["not installed"]
    assert (rows[0]["name"], rows[0]["p50_ms"]) == (name, None)
    assert set(rows[0]) >= KEYS


def test_a_processor_without_bfloat16_is_said(made, monkeypatch):
    monkeypatch.setattr(peers_torch, "cpu_multiplies_bfloat16", lambda: False)
    rows = made.compare("S", 256, (), 1, ("channels_last bfloat16",))
    assert rows[0]["no_time"] == "the processor does not multiply bfloat16"


def broken(when: str, error: Exception):
    """A builder of a peer that raises."""

    def build(detector, place):
        def run(images):
            raise error

        if when == "build":
            raise error
        return peers.Peer(Tensor.contiguous, run, torch.float32)

    return build


@pytest.mark.parametrize(
    ("when", "error", "text"),
    [
        ("build", RuntimeError("no\nmemory"), "failed: RuntimeError: no"),
        ("run", RuntimeError("no memory"), "failed: RuntimeError: no memory"),
        ("build", ImportError("needs onnx"), "not installed: needs onnx"),
        ("run", ValueError(), "failed: ValueError: "),
    ],
)
def test_a_peer_that_fails_says_so_and_stops_nobody(when, error, text, made, monkeypatch):
    monkeypatch.setitem(peers.PEERS["cpu"], LAST, broken(when, error))
    rows = made.compare("S", 256, ("float32",), 1, (LAST, NELSON))
    assert [r["no_time"] for r in rows] == [None, text, None, None]
    assert [r["kind"] for r in rows] == ["end_to_end", "peer", "peer", "ratio"]


def test_a_wrong_peer_is_refused_a_time(made, monkeypatch):
    def build(detector, place):
        right = peers_torch.nelson(detector, place)

        def run(images):
            scores, maps = right.run(images)
            return scores, maps * 1.01

        return peers.Peer(right.prepare, run, right.dtype)

    monkeypatch.setitem(peers.PEERS["cpu"], LAST, build)
    rows = made.compare("S", 256, ("float32",), 2, (LAST, NELSON))
    ours, wrong, right, ratio = rows
    assert wrong["no_time"].startswith("wrong: map error 0.0")
    assert (wrong["p50_ms"], wrong["images_per_s"], wrong["calls"]) == (None, None, None)
    assert ratio["against"] == NELSON
    assert ratio["ratio"] == pytest.approx(right["p50_ms"] / ours["p50_ms"], rel=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "OpenVINO", "OpenVINO bfloat16"])
def test_exported_peers(name, made):
    pytest.importorskip("onnxscript")
    pytest.importorskip(name.split()[0].lower())
    found = made.peer(name, "S", 256, 2).row
    if found["no_time"] == "the processor does not multiply bfloat16":
        pytest.skip(found["no_time"])
    assert found["no_time"] is None
    assert found["map_error"] <= (5e-2 if "bfloat16" in name else 1e-4)


@pytest.mark.slow
def test_compiled_peers(made):
    rows = made.compile("S", 256, ("float32",), 1)
    assert [r["kind"] for r in rows].count("end_to_end") == 0
    for r in rows:
        assert r["no_time"] in (None, "the processor does not multiply bfloat16")
    assert rows[0]["map_error"] <= 1e-4
    assert rows[0]["p50_ms"] > 0


# ---- measurements ----------------------------------------------------------------------------


def test_ours_and_peers_in_one_race(made):
    rows = made.compare("S", 256, ("float32",), 2, (NELSON, LAST))
    assert [(r["kind"], r["name"]) for r in rows] == [
        ("end_to_end", "FastPredictor"),
        ("peer", NELSON),
        ("peer", LAST),
        ("ratio", f"{NELSON} / FastPredictor"),
        ("ratio", f"{LAST} / FastPredictor"),
    ]
    for r in rows:
        assert set(r) >= KEYS
        assert (r["size"], r["batch"], r["image_size"]) == ("S", 2, [256, 256])
        assert (r["dtype"], r["device"]) == ("float32", "cpu")
    for r in rows[:3]:
        assert r["map_error"] <= 1e-4
        assert (r["rank_errors"], r["calls"], r["warmup"]) == (0, 2, 1)
        assert r["p50_ms"] > 0
    json.dumps(rows, allow_nan=False)


def test_the_same_version_gives_the_same_numbers(made, tmp_path):
    again = Bench(made.options, tmp_path)
    a, b = (one.detector("S", 256).state_dict() for one in (made, again))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert (made.frames(256) == again.frames(256)).all()
    first, second = (one.ours("S", 256, "float32", 1).row for one in (made, again))
    assert [first[name] for name in ACCURACY] == [second[name] for name in ACCURACY]


def test_a_predictor_that_refuses_is_a_row_that_says_why(made, tmp_path, monkeypatch):
    asked = []

    def refuse(detector, batches, device, dtype, **extra):
        asked.append((dtype, extra))
        raise ValueError("fp8 changes the order of the scores")

    monkeypatch.setattr(bench_measurements.end_to_end, "build_predictor", refuse)
    monkeypatch.setattr(bench_measurements, "CALIBRATION_IMAGES", 3)
    bench = Bench(made.options, tmp_path)
    fp8 = "float8_e4m3fn"
    rows = bench.compare("S", 256, (fp8,), 1, (NELSON,))
    rows += bench.stages("S", 256, fp8, 1) + bench.camera("S", 256, fp8)
    rows += bench.cold_start("S", 256, fp8)
    assert [r["kind"] for r in rows] == ["end_to_end", "peer", "stage", "frame", "cold_start"]
    for r in rows[:1] + rows[2:]:
        assert r["no_time"] == "not built: fp8 changes the order of the scores"
        assert (r["dtype"], r["p50_ms"]) == (fp8, None)
    assert rows[1]["p50_ms"] > 0
    assert len(asked) == 1
    assert len(find_images(asked[0][1]["calibration"])) == 3
    other, plain = bench.detector("S", 256, fp8), bench.detector("S", 256)
    assert torch.equal(other.teacher_mean, plain.teacher_mean)
    assert not torch.equal(other.quantiles, plain.quantiles)
    assert not torch.equal(bench.expected("S", 256, fp8)[1], bench.expected("S", 256)[1])


def test_a_wrong_predictor_gets_no_time_in_any_row(made, monkeypatch):
    scores, maps = made.expected("S", 256)
    monkeypatch.setattr(made, "expected", lambda *_, **__: (scores, maps + 0.1))
    made.release()
    rows = made.compare("S", 256, ("float32",), 1) + made.stages("S", 256, "float32", 1)
    rows += made.camera("S", 256, "float32") + made.cold_start("S", 256, "float32")
    kinds = ["end_to_end", "stage", *["frame"] * 3, "cold_start"]
    assert [r["kind"] for r in rows] == kinds
    for r in rows:
        assert r["no_time"].startswith("wrong: map error")
        assert r["p50_ms"] is None


def test_stages_frames_and_cold_start(made, monkeypatch):
    monkeypatch.setattr(
        bench_measurements,
        "cold_start",
        lambda detector, **options: {"kind": "cold_start"} | options,
    )
    rows = made.stages("S", 256, "float32", 1)
    assert [r["name"] for r in rows[:4]] == ["frame path", "networks", "map", "copy out"]
    rows += made.camera("S", 256, "float32")
    assert [r["name"] for r in rows[-3:]] == ["camera frame", "JPEG file", "PNG file"]
    for r in rows:
        assert set(r) >= KEYS
        assert r["map_error"] <= 1e-4
        assert r["p50_ms"] > 0
    (cold,) = made.cold_start("S", 256, "float32")
    assert cold["map_error"] <= 1e-4
    assert (cold["dtype"], cold["batch_sizes"], cold["empty_cache"]) == ("float32", (1,), False)


def test_a_predictor_is_kept_for_one_configuration(made):
    one = made.predictor("S", 256, "float32", 1)
    assert made.predictor("S", 256, "float32", 1) is one
    assert made.predictor("S", 256, "float32", 2) is not one
    assert made.predictor("S", 256, "float32", 1) is not one


# ---- all of it -------------------------------------------------------------------------------


@pytest.fixture
def faked(monkeypatch):
    """Three measurements, of which the second fails."""

    def fail():
        raise RuntimeError("lost")

    shape = {"size": "S", "batch": 1, "image_size": [256, 256], "dtype": "float32"}

    def found(name):
        return lambda: [row("peer", name, **shape, no_time="not installed")]

    fakes = [("peer/a", found("a")), ("peer/b", fail), ("peer/c", found("c"))]
    monkeypatch.setattr(bench_predictor, "measurements", lambda options: iter(fakes))


def test_run_goes_on_after_a_failure(faked):
    lines = []
    result = run(options("cpu"), show=lines.append)
    assert [(r["name"], r["key"]) for r in result["rows"]] == [("a", "peer/a"), ("c", "peer/c")]
    assert result["about"]["failed"] == {"peer/b": "RuntimeError: lost"}
    assert result["about"]["left_out"] == []
    assert result["about"]["device"]
    assert len(lines) == 4


def test_run_stops_at_the_budget(faked):
    result = run(options("cpu"), budget=-1)
    assert result["rows"] == []
    assert result["about"]["left_out"] == ["peer/a", "peer/b", "peer/c"]


def test_the_command_writes_a_results_file(faked, tmp_path, capsys):
    path = tmp_path / "out.json"
    assert bench_predictor.main(["--device", "cpu", "--json", str(path)]) == 1
    assert [r["name"] for r in record.read(path)["rows"]] == ["a", "c"]
    assert "peer/b: RuntimeError: lost" in capsys.readouterr().out
    assert bench_predictor.main(["--device", "cpu", "--budget", "-1"]) == 0
    assert "left out: peer/c" in capsys.readouterr().out


def test_the_command_takes_its_options(monkeypatch):
    asked = []
    monkeypatch.setattr(bench_predictor, "measurements", lambda o: asked.append(o) or iter(()))
    arguments = "--device cpu --sizes M --batches 1 2 --image-sizes 300 --dtypes float32 --calls 9"
    bench_predictor.main(f"{arguments} --warmup 3 --seconds 2 --peers --compile".split())
    (found,) = asked
    assert (found.sizes, found.batches, found.image_sizes) == (("M",), (1, 2), (300,))
    assert (found.dtypes, found.calls, found.warmup) == (("float32",), 9, 3)
    assert (found.seconds, found.peers, found.compile) == (2.0, (), True)
