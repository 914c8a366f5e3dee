"""The drop-in for anomalib: same class, same results, changed weights noticed."""

from __future__ import annotations

import copy
import io
import threading
import warnings
from typing import NamedTuple

import helpers
import helpers_foreign
import pytest
import torch
import torch.nn.functional as F
from helpers_adapters import TOLERANCE, largest_difference
from torch import Tensor, nn

from efficientad.adapters import anomalib as adapter
from efficientad.adapters.anomalib import accelerate

pytestmark = pytest.mark.usefixtures("light_networks")


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


class InferenceBatch(NamedTuple):
    pred_score: Tensor | None = None
    pred_label: Tensor | None = None
    anomaly_map: Tensor | None = None
    pred_mask: Tensor | None = None


class Model(helpers_foreign.EfficientAdModel):
    """anomalib's forward, from its description: what it does in which order."""

    calls = 0

    def raw(self, image: Tensor) -> tuple[Tensor, Tensor]:
        maps = [m[:, None] for m in self.raw_maps(image)]
        if self.pad_maps:
            maps = [F.pad(m, (4, 4, 4, 4)) for m in maps]
        return [F.interpolate(m, size=image.shape[-2:], mode="bilinear") for m in maps]

    def forward(self, batch, batch_imagenet=None, normalize=True):
        self.calls += 1
        if self.training:
            return torch.ones(()), torch.ones(()), torch.ones(())
        st, ae = self.raw(batch)
        q = self.quantiles
        if normalize and any(value != 0 for value in q.values()):
            st = 0.1 * (st - q["qa_st"]) / (q["qb_st"] - q["qa_st"])
            ae = 0.1 * (ae - q["qa_ae"]) / (q["qb_ae"] - q["qa_ae"])
        return self.result(0.5 * st + 0.5 * ae, st, ae)

    def result(self, anomaly_map, st, ae):
        return InferenceBatch(anomaly_map=anomaly_map, pred_score=anomaly_map.amax((-2, -1)))


class Model1(Model):
    """1.x's result."""

    def result(self, anomaly_map, st, ae):
        return {"anomaly_map": anomaly_map, "map_st": st, "map_ae": ae}


class Lightning(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(batch)


def anomalib_like(cls=Model, seed: int = 0, calibrated: bool = True, **options) -> Model:
    model = helpers_foreign.anomalib_model(seed, calibrated, **options)
    model.__class__ = cls
    return model


def fresh(model: Model) -> Model:
    copied = copy.deepcopy(model)
    copied.calls = 0
    return copied


def own(model: nn.Module, batch: Tensor):
    with torch.no_grad():
        return type(model).forward(model, batch)


@pytest.fixture(scope="module")
def model() -> Model:
    return anomalib_like()


@pytest.fixture(scope="module")
def fast(model) -> Model:
    return accelerate(fresh(model), device="cpu")


def test_results_are_the_models_own(model, fast):
    batch = helpers.images(2, seed=1)
    expected = own(model, batch)
    assert largest_difference(fast(batch), expected) <= TOLERANCE
    calls = fast.calls  # of the comparison at the first call
    first = InferenceBatch(*(None if v is None else v[:1] for v in expected))
    assert largest_difference(fast(batch[:1]), first) <= TOLERANCE
    assert fast.calls == calls


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"padding": True}, {"pad_maps": False}, {"medium": True}], ids=str
)
def test_variants(options):
    model = anomalib_like(**options)
    batch = helpers.images(2, seed=2)
    expected = own(model, batch)
    assert largest_difference(accelerate(model)(batch), expected) <= TOLERANCE


@pytest.mark.slow
def test_the_result_of_1x(model):
    old = fresh(model)
    old.__class__ = Model1
    batch = helpers.images(1, seed=3)
    expected = own(old, batch)
    assert set(expected) == {"anomaly_map", "map_st", "map_ae"}
    assert largest_difference(accelerate(old)(batch), expected) <= TOLERANCE


@pytest.mark.slow
def test_an_uncalibrated_model_gives_its_raw_maps():
    model = anomalib_like(calibrated=False)
    batch = helpers.images(1, seed=4)
    expected = own(model, batch)
    assert expected.anomaly_map.min() == 0  # the frame
    assert largest_difference(accelerate(model)(batch), expected) <= TOLERANCE
    assert model.calls == 2


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(256, 256), (257, 391), (300, 256)])
def test_anomalibs_own_file(anomalib, shape):
    ours = helpers.detector(image_size=shape, border="anomalib")
    theirs = anomalib.EfficientAdModel(teacher_out_channels=384).eval()
    state = {k.replace("autoencoder.", "ae."): v for k, v in ours.state_dict().items()}
    state = {k: v for k, v in state.items() if k.startswith(("teacher.", "student.", "ae."))}
    state["mean_std.mean"], state["mean_std.std"] = ours.teacher_mean, ours.teacher_std
    for name, value in zip(("qa_st", "qb_st", "qa_ae", "qb_ae"), ours.quantiles, strict=True):
        state[f"quantiles.{name}"] = value
    theirs.load_state_dict(state)
    batch = helpers.images(2, *shape, seed=5)
    with torch.no_grad():
        expected = theirs(batch)
    found = accelerate(theirs)(batch)
    assert isinstance(found, anomalib.InferenceBatch)
    assert largest_difference(found, expected) <= TOLERANCE


@pytest.mark.slow
def test_the_lightning_module_keeps_its_class(model):
    whole = Lightning(fresh(model)).eval()
    names = list(whole.state_dict())
    assert accelerate(whole) is whole
    assert list(whole.state_dict()) == names
    batch = helpers.images(1, seed=6)
    assert largest_difference(whole(batch), own(model, batch)) <= TOLERANCE
    assert whole.model.calls == 1
    whole(batch)
    assert whole.model.calls == 1
    del whole.model.forward
    whole(batch)
    assert whole.model.calls == 2


def test_other_calls_go_to_the_models_own_forward(model, fast):
    batch = helpers.images(1, seed=7)
    fast(batch)
    calls = fast.calls
    fast.train()
    assert fast(batch, batch) == (1, 1, 1)
    fast.eval()
    assert fast.calls == calls + 1
    raw = fast(batch, normalize=False)
    assert torch.equal(raw.anomaly_map, model(batch, normalize=False).anomaly_map)
    assert torch.equal(fast(batch, None, False).anomaly_map, raw.anomaly_map)
    assert fast.calls == calls + 3
    with pytest.raises(RuntimeError):  # its own error for a size it cannot take
        fast(torch.rand(1, 3, 128, 128))


@pytest.mark.parametrize("name", ["in_place", *slow("replaced", "loaded")])
def test_changed_weights_are_noticed(name, model):
    changed = fresh(model)
    accelerate(changed)
    batch = helpers.images(1, seed=8)
    before = changed(batch)

    def in_place():
        changed.student.conv4.bias.add_(0.3)

    def replaced():
        values = {"mean": torch.rand(1, 384, 1, 1), "std": torch.rand(1, 384, 1, 1) + 0.5}
        changed.mean_std.update(values)

    def loaded():
        state = changed.state_dict()
        changed.load_state_dict({k: v * 1.01 for k, v in state.items()})

    with torch.no_grad():
        {"in_place": in_place, "replaced": replaced, "loaded": loaded}[name]()
    calls = changed.calls
    found, expected = changed(batch), own(changed, batch)
    assert changed.calls == calls + 1  # only `own`
    assert largest_difference(found, expected) <= TOLERANCE
    assert largest_difference(found, before) > 1e-3


def test_predictors_are_kept_per_size_and_no_more_than_a_few(monkeypatch):
    fast = anomalib_like()
    made = []

    class Light:
        def __init__(self, build, tensors, options):
            self.source, self.predictor = tensors[0].device, None
            made.append(build)

        def detect(self, images):
            return None

        def update(self, build, tensors):
            pass

        def refuse_unless_equal(self, pairs, what):
            pass

    monkeypatch.setattr(adapter, "Server", Light)
    monkeypatch.setattr(adapter._FastForward, "_own", lambda self, batch: None)
    monkeypatch.setattr(adapter._FastForward, "_learn", lambda *a: [])
    accelerate(fast)
    for width in (256, 288, 320, 352, 256, 384, 256, 288):
        fast(torch.zeros(1, 3, 256, width))
    assert len(made) == 6  # 288 was dropped when 384 came
    assert len(fast.forward._servers) == adapter.MOST_SIZES


@pytest.mark.slow
def test_a_changed_network_keeps_its_own_forward(model):
    class Louder(Model):
        def result(self, anomaly_map, st, ae):
            return super().result(anomaly_map * 1.5, st, ae)

    other = fresh(model)
    other.__class__ = Louder
    accelerate(other)
    batch = helpers.images(1, seed=9)
    with pytest.warns(UserWarning, match="Louder keeps its own forward: .* differ"):
        found = other(batch)
    assert torch.equal(found.anomaly_map, own(other, batch).anomaly_map)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(batch)


@pytest.mark.slow
def test_copies_pickles_and_modes(model, fast):
    batch = helpers.images(1, seed=10)
    expected = own(model, batch)
    copied = copy.deepcopy(fast)
    assert copied.forward._model is copied
    assert not copied.forward._servers
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.forward._model is loaded
    with torch.inference_mode():
        assert largest_difference(loaded(batch), expected) <= TOLERANCE
    with torch.no_grad():
        loaded.student.conv1.bias.add_(0.1)  # after a build inside inference mode
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loaded(batch)
    assert found.anomaly_map.dtype == torch.float32
    assert largest_difference(found, own(loaded, batch)) <= TOLERANCE


@pytest.mark.slow
def test_threads(model, fast):
    batches = [helpers.images(1, seed=20 + i) for i in range(3)]
    found = [None] * 3

    def run(i):
        found[i] = fast(batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, batch in zip(found, batches, strict=True):
        assert largest_difference(one, own(model, batch)) <= TOLERANCE


def test_what_cannot_be_accelerated(model):
    with pytest.raises(ValueError, match="model is a Conv2d; it must be anomalib's"):
        accelerate(nn.Conv2d(3, 3, 3))
    with pytest.raises(ValueError, match="map_size: no such option"):
        accelerate(model, map_size="input")
    with pytest.raises(ValueError, match="device is 'tpu'"):
        accelerate(model, device="tpu")
    assert "forward" not in vars(model)
    half = fresh(model)
    with torch.no_grad():
        half.quantiles["qa_st"].zero_()
        half.quantiles["qb_st"].zero_()
    with pytest.raises(ValueError, match="half-set values"):
        accelerate(half)(helpers.images(1))
