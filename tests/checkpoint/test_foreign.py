"""Files of anomalib, nelson1425 and rximg: the same numbers, the right settings, clear refusals."""

from __future__ import annotations

import sys
import warnings

import helpers
import helpers_foreign as foreign
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from efficientad.checkpoint.loading import convert, load, load_teacher
from efficientad.checkpoint.safe_pickle import CheckpointError
from efficientad.model.detector import IMAGENET_MEAN, IMAGENET_STD

TOLERANCE = 1e-5  # of maps of order 1, float32
IMAGE = helpers.images(1)


@pytest.fixture(scope="module")
def model():
    return foreign.anomalib_model(seed=1)


@pytest.fixture(scope="module")
def maps(model):
    """Raw maps of the source networks; of order 1."""
    map_st, map_ae = model.raw_maps(IMAGE)
    assert 0.1 < map_st.mean() < 100
    assert 0.1 < map_ae.mean() < 100
    return map_st, map_ae


@torch.no_grad()
def assert_same_maps(detector, expected, image=IMAGE):
    assert not detector.training
    for got, want in zip(detector.distance_maps(image), expected, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= TOLERANCE * max(1.0, want.abs().max().item())


def assert_same_weights(detector, model):
    """Every weight, by the layer names of the source; free of forward passes."""
    pairs = ((detector.teacher, model.teacher), (detector.student, model.student))
    pairs += ((detector.autoencoder, model.ae),)
    for ours, theirs in pairs:
        want = theirs.state_dict()
        got = ours.state_dict()
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name].float()) for name in want)


# ---- anomalib ------------------------------------------------------------------------------------


def test_anomalib_1_checkpoint(model, maps, tmp_path):
    transform = foreign.Compose([foreign.Resize([256, 256])])
    content = foreign.lightning_checkpoint(model, 1, threshold=0.375, transform=transform)
    path = foreign.torch_save(content, tmp_path / "model.ckpt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector = load(path)
    assert_same_maps(detector, maps)
    assert detector.calibrated
    assert detector.threshold == 0.375
    assert detector.quantiles.tolist() == [0.25, 0.75, 0.5, 1.25]
    assert torch.equal(detector.teacher_std, model.mean_std["std"].detach())
    assert (detector.size, detector.border, detector.map_padding) == ("S", "anomalib", 4)
    assert (detector.padding, detector.image_size) == (False, (256, 256))
    assert detector.provenance["source"] == "anomalib 1.x"
    assert detector.provenance["lightning"] == "2.4.0"
    assert "anomalib" not in sys.modules
    assert "torchvision.transforms.v2._container" not in sys.modules


def test_anomalib_2_checkpoint(model, tmp_path):
    transform = foreign.Compose([foreign.Resize((320, 288)), foreign.CenterCrop(256)])
    content = foreign.lightning_checkpoint(model, 2, float("nan"), transform)
    detector = load(foreign.torch_save(content, tmp_path / "model.ckpt"))
    assert_same_weights(detector, model)
    assert detector.calibrated
    assert detector.threshold is None  # NaN: never computed
    assert detector.image_size == (320, 288)
    assert detector.provenance["source"] == "anomalib 2.x"
    assert "transform CenterCrop is not applied" in detector.provenance["notes"]
    content = foreign.lightning_checkpoint(model, 2, 0.5)
    detector = load(foreign.torch_save(content, tmp_path / "model.ckpt"))
    assert detector.threshold == 0.5
    assert detector.image_size == (256, 256)
    assert convert(tmp_path / "model.ckpt", image_size=(512, 256)).image_size == (512, 256)


def test_anomalib_exports(model, tmp_path):
    transform = foreign.Compose([foreign.Resize(300)])
    exported = foreign.InferenceModel(model, transform)
    metadata = {"task": foreign.TaskType.SEGMENTATION, "image_threshold": 0.625}
    path = tmp_path / "model.pt"
    detector = load(foreign.torch_save({"model": exported, "metadata": metadata}, path))
    assert_same_weights(detector, model)
    assert (detector.threshold, detector.image_size) == (0.625, (300, 300))
    assert detector.provenance["source"] == "anomalib 1.x"
    assert detector.provenance["file"] == "model.pt"  # not the folder it was in

    pre = foreign.PreProcessor(foreign.Compose([foreign.Resize([256, 384])]))
    whole = foreign.EfficientAd(model, pre, foreign.PostProcessor(0.25))
    detector = load(foreign.torch_save({"model": whole}, path))
    assert_same_weights(detector, model)
    assert detector.quantiles.tolist() == [0.25, 0.75, 0.5, 1.25]
    assert (detector.threshold, detector.image_size) == (0.25, (256, 384))
    assert detector.provenance["source"] == "anomalib 2.x"


def test_anomalib_padded_export(tmp_path):
    padded = foreign.anomalib_model(seed=2, padding=True, pad_maps=False)
    content = {"model": foreign.InferenceModel(padded, foreign.Compose([]))}
    detector = load(foreign.torch_save(content, tmp_path / "model.pt"))
    assert (detector.padding, detector.map_padding) == (True, 0)
    assert_same_maps(detector, padded.raw_maps(IMAGE))


@pytest.mark.slow
def test_anomalib_medium_state_dict_in_half(tmp_path):
    medium = foreign.anomalib_model(seed=3, medium=True).half()
    path = tmp_path / "state.pth"
    torch.save(medium.state_dict(), path)
    detector = load(path)
    assert detector.size == "M"
    assert detector.student.conv6.weight.dtype == torch.float32
    assert_same_maps(detector, medium.float().raw_maps(IMAGE))
    assert detector.provenance["notes"]  # padding and pad_maps are assumed


def test_safetensors_state_dict(model, tmp_path):
    save_file(model.state_dict(), tmp_path / "state.safetensors")
    assert_same_weights(load(tmp_path / "state.safetensors"), model)


def test_uncalibrated_and_half_set(model, tmp_path):
    state = {name: value.clone() for name, value in model.state_dict().items()}
    path = tmp_path / "state.pth"

    def saved(zero=(), absent=()):
        changed = {k: torch.zeros_like(v) if k in zero else v for k, v in state.items()}
        torch.save({k: v for k, v in changed.items() if k not in absent}, path)
        return path

    statistics = ("mean_std.mean", "mean_std.std")
    quantiles = tuple(f"quantiles.{name}" for name in ("qa_st", "qb_st", "qa_ae", "qb_ae"))
    for zero, absent in ((statistics + quantiles, ()), ((), statistics + quantiles)):
        detector = load(saved(zero, absent))
        assert not detector.has_statistics
        assert not detector.calibrated
    detector = load(saved(quantiles))
    assert detector.has_statistics
    assert not detector.calibrated
    for zero, absent in (
        (quantiles[:2], ()),
        (quantiles[2:], ()),
        (statistics[:1], ()),
        (statistics[1:], ()),
        (statistics, ()),
        ((), quantiles[:1]),
        ((), statistics[1:]),
    ):
        with pytest.raises(CheckpointError, match=r"state\.pth: has half-set values"):
            load(saved(zero, absent))


def test_double_normalization(model, tmp_path):
    """anomalib 1.0.x: normalising twice is mean m (1 + s), std s^2, once."""
    m, s = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    transform = foreign.Compose([foreign.Resize((256, 256)), foreign.Normalize()])
    content = foreign.lightning_checkpoint(model, 1, transform=transform)
    path = foreign.torch_save(content, tmp_path / "model.ckpt")
    with pytest.warns(UserWarning, match="both are applied"):
        detector = load(path)
    assert torch.allclose(detector.image_mean.flatten(), m * (1 + s), atol=1e-7)
    assert torch.allclose(detector.image_std.flatten(), s * s, atol=1e-7)
    assert detector.calibrated
    assert any("Normalize" in note for note in detector.provenance["notes"])
    assert_same_maps(detector, model.raw_maps((IMAGE - foreign.MEAN) / foreign.STD))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        single = convert(path, double_normalization=False)
        torch.save(model.state_dict(), path)
        forced = convert(path, double_normalization=True)
    assert torch.equal(single.image_mean.flatten(), m)
    assert torch.equal(forced.image_mean, detector.image_mean)
    assert torch.equal(load(path).image_std.flatten(), s)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s.pop("model.ae.decoder.deconv3.bias"), "deconv3.bias is missing"),
        (lambda s: s.update({"model.student.conv9.weight": torch.ones(1)}), "conv9.weight is not"),
        (lambda s: s["model.teacher.conv2.weight"].resize_(256, 128, 4, 3), "has shape"),
        (lambda s: s["model.student.conv3.bias"].fill_(float("nan")), "student.conv3.bias has a N"),
        (lambda s: s["model.mean_std.std"].fill_(float("inf")), "std has a NaN or infinite"),
        (lambda s: s["model.mean_std.std"].resize_(1, 7), "mean_std.std has shape"),
        (lambda s: s["model.quantiles.qb_st"].fill_(float("nan")), "qb_st is nan"),
        (lambda s: s["model.quantiles.qb_st"].fill_(0.1), "q_b must be >= q_a"),
    ],
)
def test_anomalib_refusals(model, tmp_path, change, match):
    content = foreign.lightning_checkpoint(model, 1)
    content["state_dict"] = {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in content["state_dict"].items()
    }
    change(content["state_dict"])
    path = foreign.torch_save(content, tmp_path / "model.ckpt")
    with pytest.raises(CheckpointError, match=match) as error:
        load(path)
    assert "model.ckpt" in str(error.value)


# ---- nelson1425 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [True, False])
def test_nelson_folder(tmp_path, dropout):
    source = foreign.anomalib_model(seed=4, calibrated=False)
    folder = foreign.nelson_folder(tmp_path / "bottle", source, dropout)
    detector = load(folder)
    assert_same_weights(detector, source)
    if dropout:
        assert_same_maps(detector, source.raw_maps(IMAGE))
    assert not detector.has_statistics
    assert not detector.calibrated
    assert (detector.border, detector.map_padding, detector.score_size) == ("nelson", 4, "source")
    assert detector.provenance["file"] == "bottle"


def test_nelson_refusals(model, tmp_path):
    folder = foreign.nelson_folder(tmp_path / "out", model)
    good = (folder / "student_final.pth").read_bytes()
    torch.save(foreign.nelson_pdn(model.student, padding=True), folder / "student_final.pth")
    with pytest.raises(CheckpointError, match=r"student_final\.pth: is a padded PDN"):
        load(folder)
    torch.save(foreign.nelson_pdn(model.teacher), folder / "student_final.pth")
    with pytest.raises(CheckpointError, match="holds the teacher; expected the student"):
        load(folder)
    (folder / "student_final.pth").write_bytes(good)
    ae = foreign.nelson_autoencoder(model.ae, dropout=True, last=64)
    torch.save(ae, folder / "autoencoder_final.pth")
    with pytest.raises(CheckpointError, match="resizes to"):
        load(folder)
    torch.save(nn.Sequential(*ae, nn.Conv2d(384, 384, 1)), folder / "autoencoder_final.pth")
    with pytest.raises(CheckpointError, match="has convolutions at 0, 2, 4"):
        load(folder)
    (folder / "autoencoder_final.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"autoencoder_final\.pth"):
        load(folder)


# ---- rximg ---------------------------------------------------------------------------------------


def test_rximg_folder(tmp_path):
    source = foreign.anomalib_model(seed=5, padding=True)
    folder = foreign.rximg_folder(tmp_path / "ckptSmall", source)
    detector = load(folder)
    assert_same_maps(detector, source.raw_maps(IMAGE))
    assert detector.calibrated
    assert detector.quantiles.tolist() == [0.25, 0.75, 0.5, 1.25]
    assert (detector.padding, detector.border, detector.map_padding) == (True, "paper", 0)
    assert any("central 224" in note for note in detector.provenance["notes"])

    foreign.rximg_folder(folder, source, "cable")
    with pytest.raises(CheckpointError, match="categories 'bottle', 'cable'"):
        load(folder)
    (folder / "cable_quantiles.npy").unlink()
    (folder / "best_teacher.pth").rename(tmp_path / "teacher.pth")
    with pytest.raises(FileNotFoundError, match=r"best_teacher\.pth"):
        convert(folder, category="cable")
    detector = convert(folder, category="cable", teacher=tmp_path / "teacher.pth")
    assert_same_weights(detector, source)
    assert not detector.has_statistics
    assert not detector.calibrated

    state = torch.load(folder / "bottle_student.pth")
    state["pdn.bn1.weight"] = torch.ones(128)
    torch.save(state, folder / "bottle_student.pth")
    with pytest.raises(CheckpointError, match="batch normalisation"):
        convert(folder, category="bottle", teacher=tmp_path / "teacher.pth")


def test_options_of_another_source(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "state.pth")
    with pytest.raises(CheckpointError, match="category is 'x'; it is for rximg"):
        convert(tmp_path / "state.pth", category="x")
    with pytest.raises(CheckpointError, match=r"image_size is .* for anomalib"):
        convert(foreign.nelson_folder(tmp_path / "out", model), image_size=(256, 256))


# ---- one network alone ---------------------------------------------------------------------------


@pytest.mark.parametrize("medium", [False, True])
@torch.no_grad()
def test_teacher_files(tmp_path, medium):
    """Every spelling of a teacher; 64x64 pixels are enough for a PDN."""
    torch.manual_seed(6)
    source = foreign.PatchNetwork(384, padding=False, medium=medium)
    path, size = tmp_path / "teacher.pth", "M" if medium else "S"
    x = torch.rand(1, 3, 64, 64)
    want = source(x)
    for content in (
        foreign.nelson_pdn(source).state_dict(),
        foreign.nelson_pdn(source),
        source.state_dict(),
        nn.ModuleDict({"pdn": source}).state_dict(),
        source.state_dict(),
    ):
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=r"--teacher teacher\.pth"):
            load(path)
        teacher = load_teacher(path, size)
        assert teacher.size == size
        assert not any(p.requires_grad for p in teacher.parameters())
        assert (teacher(x) - want).abs().max() <= TOLERANCE
    save_file(source.state_dict(), tmp_path / "t.safetensors")
    assert torch.equal(load_teacher(tmp_path / "t.safetensors").conv1.weight, source.conv1.weight)
    with pytest.raises(CheckpointError, match=f"PDN-{size} teacher; size is"):
        load_teacher(path, "S" if medium else "M")
    with pytest.raises(ValueError, match="size is 'L'"):
        load_teacher(path, "L")


def test_other_networks_alone(model, tmp_path):
    path = tmp_path / "part.pth"
    torch.save(foreign.nelson_pdn(model.student), path)
    for reader in (load, load_teacher):
        with pytest.raises(CheckpointError, match="holds the student"):
            reader(path)
    torch.save(model.ae.state_dict(), path)
    with pytest.raises(CheckpointError, match=r"autoencoder alone.*folder"):
        load(path)
    torch.save(foreign.PatchNetwork(100, False).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"width \(100,\)"):
        load(path)
    torch.save(nn.Linear(3, 4).state_dict(), path)
    with pytest.raises(CheckpointError, match="holds no EfficientAD"):
        load(path)
    torch.save(model.state_dict(), path)
    assert torch.equal(load_teacher(path).conv4.weight, model.teacher.conv4.weight)


# ---- Wrapped in something ------------------------------------------------------------------------


def renamed(state, change):
    return {change(name): value for name, value in state.items()}


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: f"_orig_mod.module.{name}",
        lambda name: f"model.module.{name}",
        lambda name: f"model.{name.replace('teacher.', 'teacher.module.')}",
    ],
)
@pytest.mark.parametrize("lightning", [True, False])
def test_names_of_wrappers_are_left_out(model, tmp_path, change, lightning):
    state = renamed(model.state_dict(), change)
    torch.save({"state_dict": state} if lightning else state, tmp_path / "x.ckpt")
    assert_same_weights(load(tmp_path / "x.ckpt"), model)


def test_single_networks_in_wrappers(model, tmp_path):
    teacher = renamed(model.teacher.state_dict(), lambda name: f"module.{name}")
    averaged = {"n_averaged": torch.tensor(7), **teacher}
    for number, content in enumerate((teacher, averaged, nn.DataParallel(model.teacher))):
        path = tmp_path / f"{number}.pth"
        torch.save(content, path)
        for name, value in load_teacher(path).state_dict().items():
            assert torch.equal(value, model.teacher.state_dict()[name].float())
    save_file({k: v.contiguous() for k, v in teacher.items()}, tmp_path / "x.safetensors")
    assert load_teacher(tmp_path / "x.safetensors").size == "S"
    torch.save({**teacher, **model.teacher.state_dict()}, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match=r"has conv1\.\w+ twice, once inside of a wrapper"):
        load_teacher(tmp_path / "both.pth")
