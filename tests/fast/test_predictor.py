"""The fast predictor: inputs, outputs, verdicts, threads, reload and its fallbacks."""

from __future__ import annotations

import io
import json
import re
import threading
import warnings

import helpers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import efficientad as ead
from efficientad.data.decoding import ImageError
from efficientad.data.images import resize_image, to_tensor
from efficientad.fast import self_check
from efficientad.fast.backends import TorchBackend
from efficientad.fast.frame_inputs import read_frame
from efficientad.fast.options import choose_dtype
from efficientad.fast.predictor import FastPredictor
from efficientad.ops import amx_conv, compiled_conv
from efficientad.utils.devices import choose_device

BOUND = 1e-4  # float32, of max(0.1, largest |map|)


@pytest.fixture(scope="module")
def model() -> ead.EfficientAD:
    model = helpers.detector()
    model.threshold = 0.08
    return model


class Light(TorchBackend):
    """In the network's place where a test is not about it: distances are local brightness."""

    def distance_maps(self, packed):
        brightness = F.avg_pool2d(packed.permute(0, 3, 1, 2).float().abs(), 12)
        rows, cols = (length // 4 - 8 for length in packed.shape[1:3])
        maps = F.interpolate(brightness, size=(rows, cols), mode="bilinear")
        return maps[:, 0].contiguous(), maps[:, 1].contiguous()


class LightPredictor(FastPredictor):
    torch_backend = Light


@pytest.fixture(scope="module")
def predictor(model) -> FastPredictor:
    """A light one."""
    return LightPredictor(model, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def real(model) -> FastPredictor:
    return FastPredictor(model, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def expected(model) -> list[ead.Prediction]:
    return list(ead.predict(model, list(helpers.frames(2)), map_size="input"))


def scale(anomaly_map) -> float:
    return max(0.1, float(np.abs(np.asarray(anomaly_map)).max()))


# ---- results ---------------------------------------------------------------------------------


def test_one_frame_gives_one_prediction(real, expected):
    found = real(helpers.frames(2)[0])
    assert not found.batched
    assert found.source_size == (256, 256)
    assert isinstance(found.score, torch.Tensor)
    assert found.score.shape == ()
    assert found.anomaly_map.shape == (256, 256)
    assert float(found.score) == pytest.approx(expected[0].score, abs=BOUND)
    assert np.abs(np.asarray(found.anomaly_map) - expected[0].anomaly_map).max() <= BOUND
    assert float(found.score) == float(found.anomaly_map.max())
    with pytest.raises(TypeError, match="no length"):
        len(found)


def test_a_batch_gives_one_batched_prediction(real, expected):
    found = real(helpers.frames(2))
    assert found.batched
    assert len(found) == 2
    assert found.score.shape == found.is_anomalous.shape == (2,)
    assert found.anomaly_map.shape == (2, 256, 256)
    for i, one in enumerate(found):
        assert one.index == found[i].index == i
        assert float(one.score) == pytest.approx(expected[i].score, abs=BOUND)
        assert bool(one.is_anomalous) is expected[i].is_anomalous
    assert found[-1].index == 1
    with pytest.raises(IndexError):
        found[2]
    last = found[1:]
    assert last.batched
    assert len(last) == 1
    assert list(last.index) == [1]
    assert last.score.tolist() == [float(found[1].score)]
    assert torch.equal(last[0].anomaly_map, found[1].anomaly_map)
    assert last.cpu().to_dict()["source_size"] == [[256, 256]]
    assert len(found[2:]) == 0
    with pytest.raises(ValueError, match="the step of the slice is 2; it must be 1"):
        found[::2]


def test_host_values(predictor):
    one, batch = predictor(helpers.frames(1)[0]).cpu(), predictor(helpers.frames(2)).cpu()
    assert type(one.score) is float
    assert type(one.is_anomalous) is bool
    assert isinstance(one.anomaly_map, np.ndarray)
    assert batch.score.shape == batch.is_anomalous.shape == (2,)
    assert type(batch[1].score) is float
    assert json.loads(json.dumps(one.to_dict()))["score"] == one.score
    assert json.loads(json.dumps(batch.to_dict()))["is_anomalous"] == batch.is_anomalous.tolist()


@pytest.mark.parametrize("map_size", ["input", "source", "feature", None])
def test_the_score_does_not_depend_on_the_map(map_size, predictor):
    frame = helpers.frames(1, 300, 420, seed=3)[0]
    found = predictor(frame, map_size=map_size)
    assert float(found.score) == float(predictor(frame).score)
    if map_size is None:
        assert found.anomaly_map is None
        return
    shapes = {"input": (256, 256), "source": (300, 420), "feature": (56, 56)}
    assert tuple(found.anomaly_map.shape) == shapes[map_size]


def test_regions_are_those_of_a_map_that_covers_the_frame(predictor):
    frame = helpers.frames(1, 300, 420, seed=3)[0]
    found = predictor(frame, map_size="source")
    level = float(found.anomaly_map.quantile(0.99))
    regions = found.regions(threshold=level)
    assert sum(r.area for r in regions) == int((found.anomaly_map > level).sum())
    assert regions[0].score == float(found.anomaly_map.max())
    with pytest.raises(ValueError, match="at feature size"):
        predictor(frame, map_size="feature").regions()


@pytest.mark.parametrize("map_size", ["source", "feature"])
def test_maps_of_other_sizes(map_size, real, model):
    """Pillow rounds a resized frame to whole levels, the predictor does not; hence the bound."""
    frame = helpers.frames(1, 300, 420, seed=3)[0]
    found = real(frame, map_size=map_size).anomaly_map.numpy()
    expected = next(ead.predict(model, [frame], map_size="source")).anomaly_map
    if map_size == "feature":
        image = to_tensor([resize_image(frame, (256, 256))])
        with torch.no_grad():  # an unresized padded map; its frame is not in the feature map
            padded = model.anomaly_map(*model.distance_maps(image), (64, 64))[0]
        expected = padded[0, 4:-4, 4:-4].numpy()
    assert np.abs(found - expected).max() <= 0.02 * scale(expected)


def test_maps_of_different_sizes_come_as_a_list(predictor):
    frames = [helpers.frames(1, 256, 300)[0], helpers.frames(1, 400, 260)[0]]
    found = predictor(frames, map_size="source")
    assert [tuple(m.shape) for m in found.anomaly_map] == [(256, 300), (400, 260)]
    assert found.source_size == [(256, 300), (400, 260)]
    assert [m.shape for m in found.cpu().anomaly_map] == [(256, 300), (400, 260)]
    assert predictor([frames[0]] * 2, map_size="source").anomaly_map.shape == (2, 256, 300)


def test_results_do_not_alias_the_buffers(predictor):
    frames = helpers.frames(2)
    first = predictor(frames[0])
    kept = first.score.clone(), first.anomaly_map.clone()
    predictor(frames[1])
    assert torch.equal(first.score, kept[0])
    assert torch.equal(first.anomaly_map, kept[1])


def test_the_threshold_is_a_number_that_can_be_changed(model):
    predictor = LightPredictor(model, device="cpu", dtype="float32")
    frame = helpers.frames(1)[0]
    score = float(predictor(frame).score)
    for threshold, verdict in ((score + 0.01, False), (score, False), (score - 0.01, True)):
        predictor.threshold = threshold
        assert bool(predictor(frame).is_anomalous) is verdict
    with pytest.raises(ValueError, match=r"threshold is '0\.5'; it must be a finite number"):
        predictor.threshold = "0.5"
    predictor.threshold = None
    found = predictor(frame)
    assert found.is_anomalous is None
    assert found.cpu().is_anomalous is None
    assert found.to_dict()["is_anomalous"] is None


def test_overlay(predictor):
    frame = helpers.frames(1, 300, 400)[0]
    picture = predictor(frame).overlay()
    assert picture.size == (400, 300)
    with pytest.raises(ValueError, match="index it"):
        predictor([frame]).overlay()
    with pytest.raises(ValueError, match="no map"):
        predictor(frame, map_size=None).overlay()


# ---- inputs ----------------------------------------------------------------------------------


def encoded(frame: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "PNG")
    return file.getvalue()


def test_every_kind_of_input_gives_the_same_score(predictor, tmp_path):
    frame = helpers.frames(1)[0]
    (tmp_path / "frame.png").write_bytes(encoded(frame))
    wide = np.zeros((256, 300, 3), np.uint8)
    wide[:, :256] = frame
    kinds = {
        "tensor": torch.from_numpy(frame),
        "strided rows": wide[:, :256],
        "flipped twice": frame[::-1].copy()[::-1],
        "PIL": Image.fromarray(frame),
        "path": tmp_path / "frame.png",
        "string": str(tmp_path / "frame.png"),
        "bytes": encoded(frame),
        "RGBA": np.dstack([frame, np.full((256, 256, 1), 7, np.uint8)]),
        "uint16": frame.astype(np.uint16) * 257,
    }
    score = float(predictor(frame).score)
    for name, source in kinds.items():
        assert float(predictor(source).score) == score, name
    batches = {
        "list": [frame, kinds["bytes"]],
        "tuple": (kinds["PIL"], kinds["path"]),
        "iterator": iter([frame, frame]),
        "array": np.stack([frame, frame]),
        "tensor": torch.from_numpy(np.stack([frame, frame])),
    }
    for name, source in batches.items():
        assert predictor(source).score.tolist() == [score, score], name


def test_grey_is_repeated(predictor):
    grey = helpers.frames(1)[0][..., 0].copy()
    score = float(predictor(np.repeat(grey[..., None], 3, axis=2)).score)
    assert float(predictor(grey).score) == score
    assert float(predictor(grey[..., None]).score) == score
    assert float(predictor(torch.from_numpy(grey)).score) == score


def test_a_plain_frame_is_not_copied():
    frame = np.zeros((300, 400, 3), np.uint8)
    assert np.shares_memory(read_frame(frame), frame)
    assert np.shares_memory(read_frame(frame[:, 10:300]), frame)
    assert np.shares_memory(read_frame(torch.from_numpy(frame)), frame)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 256, 256, 3, 1), np.uint8), r"shape \(2, 256, 256, 3, 1\)"),
        ([], "the batch is empty"),
        (np.zeros((0, 256, 256, 3), np.uint8), "the batch is empty"),
        (np.zeros((256, 256, 3), np.float32), "pixels are float32.*only uint8 or uint16 are read"),
        (np.zeros((256, 256, 2), np.uint8), "shape must be"),
        (np.zeros((0, 256, 3), np.uint8), "shape must be"),
        (b"no image", "not an image file that is read: it is a text"),
        ("missing.png", "no such file"),
        (3.5, "not an image source: float"),
        (np.zeros((1, 32769, 3), np.uint8), "32769x1 pixels, and a side may have at most 32768"),
        (torch.zeros(32769, 1, 3, dtype=torch.uint8), "1x32769 pixels, and a side may have"),
    ],
)
def test_bad_input_says_what_is_wrong(source, message, predictor):
    with pytest.raises(ValueError, match=message):
        predictor(source)


def test_a_bad_frame_of_a_batch_is_named_by_its_place(predictor):
    with pytest.raises(ImageError, match="frame 1"):
        predictor([helpers.frames(1)[0], b"no image"])
    with pytest.raises(ValueError, match="map_size is 'big'"):
        predictor(helpers.frames(1)[0], map_size="big")


# ---- construction ----------------------------------------------------------------------------


def test_devices_and_dtypes():
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert choose_dtype("auto", cpu, "auto") in (torch.float32, torch.bfloat16)
    assert choose_dtype("auto", torch.device("cuda", 0), "auto") == torch.float16
    assert choose_dtype(torch.bfloat16, cpu, "auto") == torch.bfloat16
    with pytest.raises(ValueError, match="bfloat16"):
        choose_dtype("float16", cpu, "auto")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        choose_dtype("int8", cpu, "auto")
    with pytest.raises(ValueError, match="device is 'gpu'"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == cpu
        with pytest.raises(ValueError, match="torch sees 0 CUDA devices"):
            choose_device("cuda")


def test_bad_construction(model):
    with pytest.raises(ead.UncalibratedError):
        FastPredictor(helpers.detector(calibrated=False))
    for sizes in ((), (0, 1)):
        with pytest.raises(ValueError, match="batch_sizes"):
            FastPredictor(model, device="cpu", batch_sizes=sizes)
    with pytest.raises(ValueError, match="backend is 'fast'"):
        FastPredictor(model, device="cpu", backend="fast")
    with pytest.raises(ValueError, match="backend is 'triton' and dtype is float32"):
        FastPredictor(model, device="cpu", backend="triton", dtype="float32")


def test_the_facts_say_what_runs(predictor):
    facts = predictor.facts
    assert facts["device"] == "cpu"
    compiled = ", compiled convolutions" if compiled_conv.available() else ""
    assert facts["backend"] == f"folded torch network{compiled}"
    assert facts["reason"] is None
    assert facts["construction_seconds"] >= 0


class _Broken:
    def __init__(self, *arguments):
        raise RuntimeError("ptxas died\nwith details")


class _Wrong(Light):
    def __init__(self, detector, dtype, device, kernels):
        super().__init__(detector, dtype, device)

    def distance_maps(self, packed):
        st, ae = super().distance_maps(packed)
        return st * 1.5, ae


@pytest.mark.parametrize(
    ("kernels", "reason"), [(_Broken, "ptxas died"), (_Wrong, "self-check failed")]
)
def test_kernels_that_cannot_be_used_are_replaced(kernels, reason, model, monkeypatch):
    """As on a GPU where they do not compile or compute something else."""
    monkeypatch.setattr(self_check, "choose_backend", lambda device: "triton")
    monkeypatch.setattr(self_check, "KernelBackend", kernels)
    with pytest.warns(UserWarning, match=reason) as caught:
        predictor = LightPredictor(model, device="cpu", dtype="bfloat16")
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert type(predictor.engine.backend) is Light
    tiles = ", AMX convolutions" if amx_conv.available() else ""
    assert predictor.facts["backend"] == f"folded torch network{tiles}"
    assert reason in predictor.facts["reason"]
    assert torch.isfinite(predictor(helpers.frames(1)[0]).score)
    with pytest.raises(ValueError, match=f"backend is 'triton'.*{reason}"):
        LightPredictor(model, device="cpu", dtype="float16", backend="triton")


def test_a_sound_backend_passes_the_self_check(model):
    backend = Light(model, torch.bfloat16, torch.device("cpu"))
    assert self_check.self_check(backend, model, (1, 3), Light) is None


class _WrongAtTwo(Light):
    """Kernels of one batch size are broken."""

    def distance_maps(self, packed):
        st, ae = super().distance_maps(packed)
        return (st * 1.5 if len(packed) == 2 else st), ae


class _NoScore(Light):
    """Sound maps, and a score that is no number."""

    def anomaly_map(self, maps, size, padding, out):
        found, score = super().anomaly_map(maps, size, padding, out)
        return found, score * torch.nan


class _WrongFrames(Light):
    def pack(self, image, packed, *, channels_last):
        super().pack(image, packed, channels_last=channels_last)
        if channels_last:
            packed[:, 0, 0] += 1


class _Unsteady(Light):
    """A race: within the bounds, and other bits at every run."""

    runs = 0

    def distance_maps(self, packed):
        st, ae = super().distance_maps(packed)
        _Unsteady.runs += 1
        return st * (1 + 1e-4 * _Unsteady.runs), ae


@pytest.mark.parametrize(
    ("kernels", "problem"),
    [
        (_WrongAtTwo, "failed at batch 2: difference"),
        (_NoScore, "failed at batch 4: difference nan"),
        (_WrongFrames, "failed at batch 4: frames and images .* packed differently"),
        (_Unsteady, "failed at batch 4: two runs on the same images gave different results"),
    ],
)
def test_the_self_check_sees_every_bucket_frames_and_races(kernels, problem, model, monkeypatch):
    monkeypatch.setattr(self_check, "repeats", lambda device: 2)
    backend = kernels(model, torch.bfloat16, torch.device("cpu"))
    assert re.search(problem, self_check.self_check(backend, model, (1, 2, 4), Light))


def test_a_callers_autocast_changes_nothing(model, monkeypatch):
    monkeypatch.setattr(compiled_conv, "available", lambda: False)
    predictor, frame = FastPredictor(model, device="cpu", dtype="float32"), helpers.frames(1)[0]
    expected = predictor(frame)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(predictor(frame).anomaly_map, expected.anomaly_map)


# ---- steps -----------------------------------------------------------------------------------


def test_a_score_is_the_same_at_every_place_of_a_batch(model):
    predictor = FastPredictor(model, device="cpu", dtype="float32", batch_sizes=(1, 2, 4))
    frames = list(helpers.frames(5, seed=8))
    alone = [float(predictor(frame).score) for frame in frames[3:]]
    five = predictor(frames).score.tolist()  # 4 + 1
    order = (3, 4, 0, 1)
    assert predictor([frames[i] for i in order]).score.tolist()[2:] == five[:2]
    assert predictor([frames[i] for i in order]).score.tolist()[0] == five[3]
    assert abs(alone[0] - five[3]) <= 1e-4
    assert alone[1] == five[4]


def test_one_nan_image_leaves_its_neighbours_alone(model):
    predictor = FastPredictor(model, device="cpu", dtype="float32", batch_sizes=(1, 3))
    images = helpers.images(3, seed=9)
    expected = predictor.detect(images)
    images[1, 1, 100, 50] = torch.nan
    found = predictor.detect(images)
    assert found.score[1].isnan()
    assert predictor.counters == {"frames": 6, "not_a_number": 1}
    for i in (0, 2):
        assert torch.equal(found.score[i], expected.score[i])
        assert torch.equal(found.anomaly_map[i], expected.anomaly_map[i])
    judged = ead.Prediction(range(3), found.score, 1e9, None, [(256, 256)] * 3)
    assert judged.is_anomalous.tolist() == [False, True, False]
    assert judged[1].cpu().is_anomalous is True


def test_detect_is_a_drop_in_for_the_detector(real, predictor, model):
    images = helpers.images(2, seed=10)
    found = real.detect(images)
    with torch.no_grad():
        expected = model(images)
    for name in ("score", "anomaly_map", "map_st", "map_ae"):
        a, b = getattr(found, name), getattr(expected, name)
        assert a.shape == b.shape
        assert (a - b).abs().max() <= BOUND * max(0.1, b.abs().max())
    for bad in (images[:, :, :200], images[0], images[:0], (images * 255).byte()):
        with pytest.raises(ValueError, match=r"images have|batch is empty"):
            predictor.detect(bad)


@pytest.mark.parametrize(
    ("border", "padding"), [("nelson", False), ("anomalib", False), ("paper", True)]
)
def test_border_rules(border, padding):
    model = helpers.detector("S", padding=padding, border=border)
    images = helpers.images(1, seed=11)
    found = FastPredictor(model, device="cpu", dtype="float32").detect(images)
    with torch.no_grad():
        anomaly_map, score = model.anomaly_map(found.map_st, found.map_ae, (256, 256))
    assert (found.anomaly_map - anomaly_map).abs().max() <= 1e-6 * scale(anomaly_map)
    assert (found.score - score).abs().max() <= 1e-6 * scale(anomaly_map)


def test_the_score_at_source_size():
    other = helpers.detector("S", score_size="source")
    predictor = LightPredictor(other, device="cpu", dtype="float32")
    frames = [helpers.frames(1, 256, 256)[0], helpers.frames(1, 300, 500, seed=2)[0]]
    found = predictor(frames)
    for i, map_size in enumerate(("input", None)):
        one = predictor(frames[i], map_size=map_size)
        at_source = predictor(frames[i], map_size="source")
        assert float(one.score) == float(at_source.score) == float(at_source.anomaly_map.max())
        assert float(one.score) == pytest.approx(float(found.score[i]), abs=1e-6)


def test_threads_share_a_predictor(predictor):
    frames = list(helpers.frames(4, seed=12))
    expected = [float(predictor(frame).score) for frame in frames]
    found: dict[int, list[float]] = {}

    def work(i: int) -> None:
        found[i] = [float(predictor(frames[(i + k) % 4]).score) for k in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {i: [expected[(i + k) % 4] for k in range(3)] for i in range(4)}


def test_reload_takes_over_another_detector(model):
    other = helpers.detector("S", seed=1)
    other.threshold = 0.5
    predictor = FastPredictor(model, device="cpu", dtype="float32")
    frame = helpers.frames(1)[0]
    before = float(predictor(frame).score)
    predictor.reload(other)
    assert predictor.threshold == 0.5
    assert float(predictor(frame).score) == float(
        FastPredictor(other, device="cpu", dtype="float32")(frame).score
    )
    predictor.reload(model)
    assert float(predictor(frame).score) == before
    with pytest.raises(ValueError, match="build a new predictor"):
        predictor.reload(helpers.detector("S", image_size=(256, 288)))
    with pytest.raises(ValueError, match=r"\('M', False\)"):
        predictor.reload(helpers.detector("M"))
    with pytest.raises(ead.UncalibratedError):
        predictor.reload(helpers.detector("S", calibrated=False))


def test_the_detector_may_change_afterwards(model):
    own = helpers.detector("S", seed=3)
    predictor = FastPredictor(own, device="cpu", dtype="float32")
    frame = helpers.frames(1)[0]
    before = float(predictor(frame).score)
    with torch.no_grad():
        own.student.conv2.weight.zero_()
        own.affine.zero_()
        own.image_mean.zero_()
    assert float(predictor(frame).score) == before


def test_nothing_is_warned_on_the_plain_path(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        FastPredictor(model, device="cpu")(helpers.frames(1)[0])
