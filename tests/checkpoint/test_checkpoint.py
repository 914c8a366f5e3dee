"""The native file: what it keeps, the self-test, the atomic write, and what is refused."""

from __future__ import annotations

import json
import os

import helpers
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from efficientad import EfficientAD
from efficientad.checkpoint import native_file
from efficientad.checkpoint.loading import convert, load, load_teacher
from efficientad.checkpoint.native_file import save
from efficientad.checkpoint.safe_pickle import CheckpointError
from efficientad.model.global_term import GlobalTerm
from efficientad.utils.files import digest_of

pytestmark = pytest.mark.usefixtures("light_networks")


def make_detector(seed: int = 0, calibrated: bool = True, **options) -> EfficientAD:
    torch.manual_seed(seed)
    detector = EfficientAD(**options)
    if calibrated:
        detector.set_statistics(torch.randn(384) * 0.1, torch.rand(384) + 0.5)
        detector.set_quantiles(0.001, 0.004, 0.0005, 0.003)
    return detector


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A calibrated detector and its file."""
    detector = make_detector(image_size=(256, 320), border="anomalib", map_padding=3)
    detector.set_image_normalization([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    detector.set_statistics(torch.randn(384) * 0.1, torch.rand(384) + 0.5)
    detector.set_quantiles(0.001, 0.004, 0.0005, 0.003)
    detector.threshold = -0.125
    detector.provenance = {"source": "test", "notes": ["ä"]}
    path = tmp_path_factory.mktemp("saved") / "detector.safetensors"
    save(detector, path)
    return detector, path


def header(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def assert_equal_state(a: EfficientAD, b: EfficientAD) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert left.keys() == right.keys()
    assert all(torch.equal(left[k].nan_to_num(7), right[k].nan_to_num(7)) for k in left)


def variant(saved, tmp_path, tensors=None, **metadata):
    """A copy of the saved file with other tensors or header entries and a fitting checksum."""
    new = load_file(saved[1]) | (tensors or {})
    new = {name: value for name, value in new.items() if value is not None}
    head = header(saved[1]) | metadata
    texts = {name: head[name] for name in native_file._TEXTS if head[name] is not None}
    head |= {"sha256": digest_of(new, texts)}
    path = tmp_path / "variant.safetensors"
    save_file(new, path, {k: v for k, v in head.items() if v is not None})
    return path


# ---- round trips ---------------------------------------------------------------------------------


def test_round_trip(saved):
    detector, path = saved
    loaded = load(path)
    assert_equal_state(detector, loaded)
    for name in ("size", "padding", "image_size", "border", "map_padding", "score_size"):
        assert getattr(loaded, name) == getattr(detector, name)
    assert loaded.threshold == -0.125
    assert loaded.provenance == {"source": "test", "notes": ["ä"]}
    assert loaded.calibrated
    assert not loaded.training
    assert torch.equal(loaded.affine, detector.affine)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert header(path)["format_version"] == "2"


@pytest.fixture
def no_golden(monkeypatch):
    """Golden values without forward passes, where they are not the point."""
    monkeypatch.setattr(native_file, "golden_values", lambda detector: {"score": 1.0})


@pytest.mark.parametrize("options", [{"size": "M"}, {"padding": True}])
def test_round_trip_of_settings(tmp_path, options):
    """Uncalibrated, saved while training: dropout must not reach the golden values."""
    detector = make_detector(1, calibrated=False, **options).train()
    save(detector, tmp_path / "x")
    loaded = load(tmp_path / "x")
    assert_equal_state(detector, loaded)
    assert detector.training
    assert not loaded.training
    assert not loaded.calibrated
    assert not loaded.has_statistics
    assert (loaded.border, loaded.map_padding) == (detector.border, detector.map_padding)
    assert loaded.threshold is None


def test_statistics_without_quantiles(tmp_path, no_golden):
    detector = make_detector()
    detector.clear_quantiles()
    save(detector, tmp_path / "x")
    loaded = load(tmp_path / "x", verify=False)
    assert loaded.has_statistics
    assert not loaded.calibrated


def test_golden_values_of_half_weights(tmp_path):
    """They are those of the stored, rounded weights."""
    save(make_detector(2).half(), tmp_path / "x")
    assert load(tmp_path / "x").student.conv1.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_load_as_float32(tmp_path, no_golden, dtype):
    detector = make_detector(2).to(dtype)
    save(detector, tmp_path / "x")
    stored = load_file(tmp_path / "x")["student.conv2.weight"].dtype
    assert stored == (torch.float32 if dtype == torch.float64 else dtype)
    loaded = load(tmp_path / "x", verify=False)
    assert {p.dtype for p in loaded.state_dict().values()} == {torch.float32}
    assert_equal_state(detector.float(), loaded)


def test_layout_of_memory_is_not_kept(tmp_path, no_golden):
    detector = make_detector().to(memory_format=torch.channels_last)
    save(detector, tmp_path / "x")
    assert_equal_state(detector, load(tmp_path / "x", verify=False))


def test_load_teacher_of_a_detector(saved):
    teacher = load_teacher(saved[1], "S")
    assert torch.equal(teacher.conv4.weight, saved[0].teacher.conv4.weight)
    assert not any(p.requires_grad for p in teacher.parameters())


def test_convert_is_for_foreign_files(saved):
    with pytest.raises(CheckpointError, match=r"is a file of efficientad\.save already"):
        convert(saved[1])


# ---- self-test -----------------------------------------------------------------------------------


def test_a_flipped_bit_in_a_weight_fails(saved, tmp_path):
    """The weakest bit of one weight: no map would show it."""
    path = tmp_path / "x"
    data = bytearray(saved[1].read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    position = json.loads(data[8:start])["student.conv3.weight"]["data_offsets"][0] + start
    data[position] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum of the file differs"):
        load(path)
    difference = load(path, verify=False).student.conv3.weight - saved[0].student.conv3.weight
    assert 0 < difference.abs().max() < 1e-6


@pytest.mark.parametrize("text", [b"-0.125", b'image_size\\": [2', b"notes", b"map_st_mean"])
def test_a_changed_setting_fails(saved, tmp_path, text):
    """Settings that no golden value shows: a threshold read wrong is a wrong verdict."""
    data = saved[1].read_bytes()
    size = int.from_bytes(data[:8], "little")
    assert data[: 8 + size].count(text) == 1
    place = data.index(text) + len(text) - 1
    changed = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    (tmp_path / "x").write_bytes(changed)
    with pytest.raises(CheckpointError, match="checksum of the file differs"):
        load(tmp_path / "x")


def test_a_file_of_the_first_version_is_read(saved, tmp_path):
    """Its checksum is that of the tensors alone."""
    with safe_open(saved[1], framework="pt") as file:
        head, tensors = file.metadata(), load_file(saved[1])
    path = tmp_path / "x"
    digest = digest_of(tensors, {})
    save_file(tensors, path, head | {"format_version": "1", "sha256": digest})
    assert_equal_state(load(path), saved[0])
    save_file(tensors, path, head | {"format_version": "1"})
    with pytest.raises(CheckpointError, match="checksum"):
        load(path)


@pytest.mark.parametrize(
    "name", ["map_st_mean", "map_st_max", "map_ae_mean", "map_ae_max", "score"]
)
def test_golden_values_are_compared(saved, tmp_path, monkeypatch, name):
    golden = json.loads(header(saved[1])["golden"])
    assert len(golden) == 5
    monkeypatch.setattr(native_file, "golden_values", lambda detector: golden)
    size = golden[name]
    if name == "score":  # it is measured by the terms whose difference it is
        a_st, a_ae, offset, _ = saved[0].affine.abs().tolist()
        size = a_st * golden["map_st_max"] + a_ae * golden["map_ae_max"] + offset
    for factor, passes in ((0.9e-3, True), (-0.9e-3, True), (1.1e-3, False), (float("nan"), False)):
        text = json.dumps(golden | {name: golden[name] + factor * size})
        path = variant(saved, tmp_path, golden=text)
        if passes:
            assert load(path).calibrated
        else:
            with pytest.raises(CheckpointError, match=f"self-test: {name} is"):
                load(path)


def test_other_weights_fail_the_golden_values(tmp_path):
    """A filter upside down, in a detector with outputs of a trained one's size."""
    path = tmp_path / "x"
    save(helpers.detector(), path)
    weight = load_file(path)["autoencoder.decoder.deconv8.weight"]
    changed = variant(
        (None, path), tmp_path, {"autoencoder.decoder.deconv8.weight": weight.flip(2)}
    )
    with pytest.raises(CheckpointError, match=r"self-test: map_ae.*damaged or was made by an inc"):
        load(changed)


REGION = torch.zeros(256, 256, dtype=torch.bool)
REGION[60:150, 40:200] = True


def test_round_trip_of_a_region(tmp_path):
    detector = make_detector(1)
    detector.set_region(REGION, keep_calibration=True)
    save(detector, tmp_path / "x")
    loaded = load(tmp_path / "x")
    assert torch.equal(loaded.region, REGION)
    assert torch.equal(loaded.region_cells, detector.region_cells)
    assert header(tmp_path / "x")["format_version"] == "3"  # older packages refuse it
    detector.set_region(None)
    save(detector, tmp_path / "x")
    assert load(tmp_path / "x", verify=False).region is None


def test_round_trip_of_a_score(tmp_path, monkeypatch):
    detector = make_detector(1)
    save(detector, tmp_path / "max")
    assert "score" not in json.loads(header(tmp_path / "max")["config"])
    detector.score, detector.threshold = 10, 0.25
    save(detector, tmp_path / "x")
    loaded = load(tmp_path / "x")
    assert (loaded.score, loaded.threshold) == (10, 0.25)
    assert header(tmp_path / "x")["format_version"] == "4"  # older packages refuse it
    scores = [json.loads(header(tmp_path / name)["golden"])["score"] for name in ("max", "x")]
    assert scores[1] < scores[0]
    monkeypatch.setattr(native_file, "FORMAT_VERSION", 3)
    with pytest.raises(CheckpointError, match=r"format version '4'.*upgrade efficientad"):
        load(tmp_path / "x")


def with_term() -> EfficientAD:
    detector = make_detector(1)
    term = GlobalTerm()
    term.mean.fill_(0.5)
    term.whitening.copy_(torch.eye(384))
    term.set_line(0.25, 2.0)
    detector.set_global_term(term)
    detector.threshold = 0.25
    return detector


def test_round_trip_of_a_global_term(tmp_path):
    detector = with_term()
    save(detector, tmp_path / "x")
    loaded = load(tmp_path / "x")
    assert_equal_state(loaded, detector)
    assert loaded.global_term.line.tolist() == [0.25, 2.0]
    assert loaded.threshold == 0.25
    assert header(tmp_path / "x")["format_version"] == "5"  # older packages refuse it
    detector.set_global_term(None)
    save(detector, tmp_path / "x")
    assert load(tmp_path / "x", verify=False).global_term is None
    assert header(tmp_path / "x")["format_version"] == "2"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("mean", None, "global_term.mean is missing"),
        ("whitening", torch.ones(384), r"global_term.whitening has shape \(384,\)"),
        ("line", torch.tensor([torch.nan, 0]), "global_term.line has a NaN"),
        ("line", torch.zeros(2, dtype=torch.int64), "global_term.line has dtype torch.int64"),
    ],
)
@pytest.mark.usefixtures("no_golden")
def test_a_global_term_that_does_not_fit_is_refused(tmp_path, name, value, message):
    detector = with_term()
    save(detector, tmp_path / "x")
    tensors = {f"global_term.{name}": value}
    with pytest.raises(CheckpointError, match=message):
        load(variant((detector, tmp_path / "x"), tmp_path, tensors))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(56, 56, dtype=torch.uint8), r"region has shape \(56, 56\), expected the image"),
        (torch.ones(256, 256), r"region is torch.float32 .*; expected uint8 \(height, width\)"),
        (torch.full((256, 256), 2, dtype=torch.uint8), "expected uint8"),
        (torch.ones(256, dtype=torch.uint8), "expected uint8"),
        (torch.zeros(256, 256, dtype=torch.uint8), "inspects no pixel"),
    ],
)
@pytest.mark.usefixtures("no_golden")
def test_a_region_that_does_not_fit_is_refused(tmp_path, value, message, monkeypatch):
    detector = make_detector(1, calibrated=False)
    detector.set_region(REGION)
    write = native_file._write_atomically
    monkeypatch.setattr(
        native_file,
        "_write_atomically",
        lambda path, tensors, metadata: write(path, {**tensors, "region": value}, metadata),
    )
    save(detector, tmp_path / "x")
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "x", verify=False)


@pytest.mark.parametrize("length", [0x80, 0x8080, 0x93])
def test_a_header_length_that_looks_like_a_pickle(saved, tmp_path, length):
    """The first byte of a safetensors file is its header's length; 0x80 also begins a pickle."""
    data = saved[1].read_bytes()
    size = int.from_bytes(data[:8], "little")
    padded = size + (length - size) % (256 if length < 256 else 65536)
    header = data[8 : 8 + size].ljust(padded)
    (tmp_path / "x").write_bytes(padded.to_bytes(8, "little") + header + data[8 + size :])
    assert_equal_state(load(tmp_path / "x", verify=False), saved[0])


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"format_version": "6"}, "format version '6'.*upgrade efficientad"),
        ({"format_version": "0"}, "format version '0'"),
        ({"format_version": "x"}, "format version 'x'"),
        ({"config": None}, "KeyError"),
        ({"config": "[" * 100_000}, "Recursion"),
        ({"golden": "{}"}, "golden values"),
        ({"provenance": "[]"}, "provenance is not"),
    ],
)
def test_bad_header_entries(saved, tmp_path, metadata, match):
    with pytest.raises(CheckpointError, match=match):
        load(variant(saved, tmp_path, **metadata))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("size", "L"),
        ("size", ["S"]),
        ("size", "M"),
        ("padding", "no"),
        ("image_size", [256]),
        ("image_size", 7),
        ("image_size", [64, 64]),
        ("border", "none"),
        ("map_padding", -1),
        ("score_size", 3),
        ("score", 0),
        ("score", "mean"),
        ("score", True),
        ("score", [10]),
        ("score", 10.5),
        ("score", 10**6),
        ("threshold", float("nan")),
        ("threshold", "high"),
        ("has_statistics", 1),
    ],
)
def test_bad_settings(saved, tmp_path, name, value):
    config = json.loads(header(saved[1])["config"]) | {name: value}
    with pytest.raises(CheckpointError, match=r"variant\.safetensors"):
        load(variant(saved, tmp_path, config=json.dumps(config)))


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"student.conv1.bias": torch.ones(127)}, r"has shape \(127,\), expected \(128,\)"),
        ({"student.conv1.bias": None}, "student.conv1.bias is missing"),
        ({"student.conv9.bias": torch.ones(1)}, "student.conv9.bias is not known"),
        ({"student.conv1.bias": torch.full((128,), float("nan"))}, "NaN or infinite"),
        ({"teacher.conv1.bias": torch.full((128,), float("inf"))}, "NaN or infinite"),
        ({"student.conv1.bias": torch.ones(128, dtype=torch.int32)}, "dtype torch.int32"),
        ({"teacher_std": torch.full((1, 384, 1, 1), -1.0)}, "negative"),
        ({"teacher_std": torch.ones(384)}, "teacher_std has shape"),
        ({"image_std": torch.zeros(1, 3, 1, 1)}, "must be > 0"),
        ({"quantiles": torch.tensor([0.1, 0.2, float("nan"), 0.4])}, "half-set"),
        ({"quantiles": torch.tensor([0.2, 0.1, 0.3, 0.4])}, "q_b must be >= q_a"),
        ({"quantiles": None}, "quantiles is missing"),
    ],
)
def test_bad_tensors(saved, tmp_path, tensors, match):
    with pytest.raises(CheckpointError, match=match):
        load(variant(saved, tmp_path, tensors), verify=False)


def test_nan_weights_are_not_saved(tmp_path):
    detector = make_detector()
    with torch.no_grad():
        detector.student.conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"student\.conv1\.weight has a NaN"):
        save(detector, tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_overflowing_maps_are_not_saved(tmp_path):
    detector = make_detector()
    with torch.no_grad():
        detector.student.conv4.bias.fill_(1e30)
    with pytest.raises(CheckpointError, match="overflow"):
        save(detector, tmp_path / "x")


def test_what_json_cannot_hold_is_not_saved(saved, tmp_path, monkeypatch, no_golden):
    monkeypatch.setattr(saved[0], "provenance", {"path": tmp_path})
    with pytest.raises(CheckpointError, match="provenance"):
        save(saved[0], tmp_path / "x")
    with pytest.raises(ValueError, match="detector is a Linear"):
        save(torch.nn.Linear(1, 1), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_absent_paths(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="create it first"):
        save(saved[0], tmp_path / "no" / "x")
    for reader in (load, convert, load_teacher):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            reader(tmp_path / "no")


# ---- atomic write --------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["save_file", "fsync", "replace"])
@pytest.mark.parametrize(
    "error", [OSError("disk full"), SafetensorError("disk full"), KeyboardInterrupt()]
)
def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch, no_golden, step, error):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def half_a_file(tensors, name, metadata):
        name.write_bytes(b"half")
        raise error

    def fail(*args):
        raise error

    if step == "save_file":
        monkeypatch.setattr(native_file, "save_file", half_a_file)
    else:
        monkeypatch.setattr(os, step, fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else OSError
    with pytest.raises(expected) as caught:
        save(make_detector(), path)
    assert expected is not OSError or str(caught.value) == f"{path} cannot be written: disk full"
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind here")
def test_a_read_only_folder(saved, tmp_path, no_golden):
    folder = tmp_path / "locked"
    folder.mkdir()
    folder.chmod(0o500)
    try:
        with pytest.raises(OSError, match="x cannot be written"):
            save(saved[0], folder / "x")
        assert list(folder.iterdir()) == []
    finally:
        folder.chmod(0o700)


def test_a_folder_in_the_way(saved, tmp_path, no_golden):
    (tmp_path / "x").mkdir()
    with pytest.raises(OSError, match="x cannot be written"):
        save(saved[0], tmp_path / "x")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
