"""Hostile and damaged files: a clear error, nothing executed, nothing allocated on their word."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import sys
import zipfile

import helpers_foreign as foreign
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from efficientad.checkpoint import safe_pickle
from efficientad.checkpoint.loading import load, load_teacher
from efficientad.checkpoint.native_file import save
from efficientad.checkpoint.safe_pickle import CheckpointError, attributes, unpickle
from efficientad.checkpoint.torch_zip import read_npy_object, read_torch
from efficientad.model.detector import EfficientAD

STORAGE_PID = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
)


def torch_file(path, pickled: bytes, storages=None, compression=zipfile.ZIP_STORED, **extra):
    """A file laid out as torch.save does, around a hand-made pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", extra.pop("byteorder", "little"))
        for key, data in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", data)
        for name, data in extra.items():
            archive.writestr(f"archive/{name}", data)
    return path


class Payload:
    """Pickles to a call of `function` with `args`."""

    def __init__(self, function, *args, state=None):
        self.parts = (function, args) if state is None else (function, args, state)

    def __reduce__(self):
        return self.parts

    def __call__(self):
        """Called by nobody; the pickler wants it of a function."""


@pytest.fixture
def payloads(tmp_path):
    """(marker, objects): unpickled by a common reader, each object writes the marker file."""
    marker = tmp_path / "executed"
    code = f"open({str(marker)!r}, 'w').close()"
    return marker, [
        Payload(os.system, f"touch {marker}"),
        Payload(exec, code),
        Payload(eval, code),
        Payload(open, str(marker), "w"),
        Payload(marker.write_text, "x"),
        Payload(getattr, Payload(__import__, "os"), "system"),
        Payload(Payload(getattr, marker, "touch"), state={"a": 1}),
        Payload(dict, state={"__reduce__": Payload(exec, code)}),
        Payload(torch._utils._rebuild_tensor_v2, Payload(exec, code), 0, (1,), (1,), False, {}),
    ]


# ---- payloads ------------------------------------------------------------------------------------


def test_the_payloads_work(payloads):
    """The control: Python's own reader runs them."""
    marker, objects = payloads
    pickle.loads(pickle.dumps(objects[1]))
    assert marker.exists()


def test_payloads_are_not_executed(payloads, tmp_path):
    marker, objects = payloads
    path = tmp_path / "x.pth"
    for item in (*objects, objects):
        for content in (
            item,
            {"state_dict": item},
            {"model": item},
            {"teacher.conv1.weight": item},
        ):
            torch.save(content, path)
            for reader in (load, load_teacher):
                with pytest.raises(CheckpointError):
                    reader(path)
        for protocol in range(2, 6):
            data = pickle.dumps(item, protocol)
            with pytest.raises(CheckpointError):
                load(torch_file(path, data))
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match="bare pickle"):
                load(path)
    assert not marker.exists()


def test_a_payload_beside_a_good_model_is_data(payloads, tmp_path):
    marker, objects = payloads
    content = foreign.lightning_checkpoint(foreign.anomalib_model(), 2)
    content["hyper_parameters"]["visualizer"] = objects
    content["callbacks"]["x"] = [objects[0], torch.ones(2, dtype=torch.complex64)]
    modules = set(sys.modules)
    assert load(foreign.torch_save(content, tmp_path / "x.ckpt")).calibrated
    assert not marker.exists()
    assert set(sys.modules) == modules


def test_payloads_in_folders_and_npy(payloads, tmp_path):
    marker, objects = payloads
    model = foreign.anomalib_model(padding=True)
    folder = foreign.rximg_folder(tmp_path / "rximg", model)
    for value in (objects[1], {"qa_st": objects[1]}, {"mean": objects}):
        np.save(folder / "bottle_quantiles.npy", np.array(value, dtype=object), allow_pickle=True)
        with pytest.raises(CheckpointError):
            load(folder)
    folder = tmp_path / "nelson"
    folder.mkdir()
    for name in ("teacher", "student", "autoencoder"):
        torch.save(objects[0], folder / f"{name}_final.pth")
    with pytest.raises(CheckpointError, match="holds no network"):
        load(folder)
    assert not marker.exists()


def test_placeholders_keep_data():
    class Thing:
        __slots__ = ("__dict__", "a")

    thing = Thing()
    thing.a, thing.b = 1, [2]
    sys.modules["made_up"] = type(sys)("made_up")
    Thing.__module__, Thing.__qualname__ = "made_up", "Thing"
    sys.modules["made_up"].Thing = Thing
    data = pickle.dumps({"thing": thing, "set": {1}, "size": foreign.EfficientAdModelSize.M})
    del sys.modules["made_up"]
    tree = unpickle(data)
    assert tree["thing"].origin == "made_up.Thing"
    assert attributes(tree["thing"]) == {"a": 1, "b": [2]}
    assert tree["set"] == {1}
    assert tree["size"].args == ("medium",)


@pytest.mark.parametrize(
    "name",
    [b"torch._utils\n_rebuild_tensor_v2", b"collections\nOrderedDict", b"torch\nFloatStorage"],
)
@pytest.mark.parametrize(
    "state", [b"}X\x01\x00\x00\x00aK\x01s", b"N}X\x09\x00\x00\x00_functionK\x01s\x86"]
)
def test_a_pickle_cannot_change_the_readers_functions(name, state):
    allowed = dict(safe_pickle._ALLOWED)
    functions = {key: getattr(value, "_function", None) for key, value in allowed.items()}
    with pytest.raises(pickle.UnpicklingError, match="no state"):
        unpickle(b"\x80\x02c" + name + b"\n" + state + b"b.")
    assert dict(safe_pickle._ALLOWED) == allowed
    assert functions == {k: getattr(v, "_function", None) for k, v in allowed.items()}


# ---- sizes that the file does not have -----------------------------------------------------------


def tensor_pickle(numel: int, offset: int, size: tuple, stride: tuple) -> bytes:
    """A pickled dict with one tensor, all of whose numbers are the caller's."""

    def number(n: int) -> bytes:
        return b"\x8a\x09" + n.to_bytes(9, "little", signed=True)

    def numbers(values: tuple) -> bytes:
        return b"(" + b"".join(map(number, values)) + b"t"

    return (
        b"\x80\x02}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
        + STORAGE_PID
        + number(numel)
        + b"tQ"
        + number(offset)
        + numbers(size)
        + numbers(stride)
        + b"\x89)tRs."
    )


def test_the_hand_made_tensor_is_good(tmp_path):
    values = np.arange(6, dtype="<f4").tobytes()
    path = torch_file(tmp_path / "x", tensor_pickle(6, 1, (2, 2), (3, 1)), {"0": values})
    assert read_torch(path)["w"].read().tolist() == [[1, 2], [4, 5]]
    assert torch.load(path)["w"].tolist() == [[1, 2], [4, 5]]


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (2**40, 0, (2**40,), (1,)),  # more than the member
        (7, 0, (6,), (1,)),
        (5, 0, (5,), (1,)),
        (6, 0, (7,), (1,)),  # more than the storage
        (6, 3, (2, 2), (3, 1)),
        (6, 2**62, (1,), (1,)),
        (6, 0, (2**40,), (0,)),  # one element, repeated
        (6, 0, (2**31, 2**31, 2**31), (0, 0, 0)),
        (6, -1, (2,), (1,)),
        (6, 0, (-2,), (1,)),
        (6, 5, (2,), (-1,)),
        (6, 0, (1,) * 9, (1,) * 9),
        (6, 0, (2, 3), (1,)),
        (-6, 0, (6,), (1,)),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, numel, offset, size, stride):
    pickled = tensor_pickle(numel, offset, size, stride)
    path = torch_file(tmp_path / "x", pickled, {"0": bytes(24)})
    with pytest.raises(CheckpointError, match=r"x: cannot be read: UnpicklingError"):
        read_torch(path)


def test_zip_containers(tmp_path):
    good = tensor_pickle(6, 0, (6,), (1,))
    path = tmp_path / "x"

    def refused(match, pickled=good, **kwargs):
        with pytest.raises(CheckpointError, match=match):
            load(torch_file(path, pickled, {"0": bytes(24)}, **kwargs))

    refused("is compressed", compression=zipfile.ZIP_DEFLATED)
    refused("big-endian", byteorder="big")
    refused("TorchScript", **{"constants.pkl": b"\x80\x02)."})
    refused(r"no data\.pkl", **{"sub/data.pkl": good})
    refused("declared as 6", pickled=good.replace(b"\x01\x00\x00\x000X", b"\x01\x00\x00\x001X"))
    refused("holds no EfficientAD")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"")
    with pytest.raises(CheckpointError, match=r"no data\.pkl"):
        load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", good)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("archive/data.pkl", good)
    with pytest.raises(CheckpointError, match="repeated"):
        load(path)


def test_a_member_larger_than_the_file(tmp_path):
    """The directory of the zip declares 4 GB; the file has a few hundred bytes."""
    path = torch_file(tmp_path / "x", tensor_pickle(2**30, 0, (2**30,), (1,)), {"0": b"only a few"})
    data = bytearray(path.read_bytes())
    entry = data.rindex(b"PK\x01\x02")
    data[entry + 20 : entry + 28] = struct.pack("<II", 2**32 - 2, 2**32 - 2)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="larger than the file"):
        load(path)


@pytest.mark.parametrize(
    ("pickled", "match"),
    [
        (b"\x80\x02}r\xff\xff\xff\xf0.", "memo entry"),
        (b"\x80\x02}p4000000000\n.", "memo entry"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.", "ValueError|BYTEARRAY8"),
        (b"\x80\x05\x96" + (2).to_bytes(8, "little") + b"xx.", "BYTEARRAY8"),
        (b"\x80\x04\x8e" + (2**40).to_bytes(8, "little") + b"x.", "ValueError"),
        (b"\x80\x04\x95" + (2**60).to_bytes(8, "little") + b"}.", "holds no|cannot be read"),
        (b"\x80\x02" + b"]" * 1_200_000 + b".", "more than 1000000 steps"),
        (b"\x80\x02" + b")" + b"\x85" * 900_000 + b".", "holds no"),
        (b"I" + b"9" * 5000 + b"\n.", "cannot be read"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02}", "exhausted"),
        (b"\x80\x02h\x07.", "cannot be read"),
        (b"\x80\x02}}Rb.", "cannot be read"),
        (b"(" + b"".join(b"ca\nb%d\n" % i for i in range(10_001)) + b"t.", "different names"),
        (b"", "cannot be read"),
    ],
)
def test_pickle_bombs(tmp_path, pickled, match):
    with pytest.raises(CheckpointError, match=match):
        load(torch_file(tmp_path / "x", pickled))


def test_a_module_that_contains_itself(tmp_path):
    """_modules refers to the module: {"model": module}."""
    pickled = (
        b"\x80\x02}X\x05\x00\x00\x00modelca\nB\n)\x81q\x01}X\x08\x00\x00\x00_modules"
        b"}X\x01\x00\x00\x00ah\x01ssbs."
    )
    with pytest.raises(CheckpointError, match="holds no"):
        load(torch_file(tmp_path / "x", pickled))


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_fuzzed_pickles():
    """Changed bytes give data or an error of the usual kinds, never a call or an endless loop."""
    buffer = io.BytesIO()
    with foreign.fake_modules():
        net = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 1), foreign.Resize((4, 4)))
        torch.save({"model": net, "state_dict": net.state_dict()}, buffer)
    good = zipfile.ZipFile(buffer).read("archive/data.pkl")
    rng = random.Random(0)
    outcomes, kinds = set(), set()
    for _ in range(3000):
        data = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            tree = unpickle(bytes(data), lambda pid: safe_pickle.Storage(torch.float32, 4, bytes))
            outcomes.add("data")
            kinds.add(type(tree).__module__)
        except Exception as error:
            outcomes.add(type(error).__name__)
    assert {"data", "UnpicklingError"} <= outcomes
    assert kinds <= {"builtins", "efficientad.checkpoint.safe_pickle"}
    assert outcomes <= {
        "data",
        "UnpicklingError",
        "ValueError",
        "TypeError",
        "AttributeError",
        "UnicodeDecodeError",
        "UnicodeEncodeError",
        "OverflowError",
        "EOFError",
        "IndexError",
        "KeyError",
    }


# ---- damaged and other files ---------------------------------------------------------------------


def test_truncated_files(tmp_path):
    """At 40 places each, from the end to the beginning."""
    model = foreign.anomalib_model()
    checkpoint = foreign.torch_save(foreign.lightning_checkpoint(model, 1), tmp_path / "model.ckpt")
    native = tmp_path / "native"
    save(EfficientAD(), native)
    teacher = tmp_path / "teacher.pth"
    torch.save(foreign.nelson_pdn(model.teacher), teacher)
    for path, reader in ((checkpoint, load), (native, load), (teacher, load_teacher)):
        size = path.stat().st_size
        lengths = {size - 1, size - 2, size - 30, 4096, 1000, 100, 9, 8, 7, 4, 3, 1, 0}
        lengths |= {size * i // 28 for i in range(1, 28)}
        for length in sorted(lengths, reverse=True):
            os.truncate(path, length)
            with pytest.raises(CheckpointError, match=path.name):
                reader(path)


def test_a_flipped_bit_in_a_foreign_weight(tmp_path):
    model = foreign.anomalib_model()
    torch.save(model.state_dict(), tmp_path / "x")
    data = bytearray((tmp_path / "x").read_bytes())
    weight = model.student.conv2.weight.detach().numpy().tobytes()
    data[data.index(weight) + 5000] ^= 1
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match="CRC"):
        load(tmp_path / "x")


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "is empty"),
        (b"teacher: yes\n", "is a text; expected"),
        (b"\x07\x08\x09", "is of an unknown format"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-LFS pointer"),
        (b"\n <!DOCTYPE html>\n<title>Quota exceeded</title>", "is a web page saved as a file"),
        (b'{"message": "Not Found"}', "is a JSON text, perhaps the error"),
        (b"\xff\xd8\xff\xe0" + bytes(9), "is a JPEG image; expected"),
        (b"PK\x03\x04" + bytes(200), "cannot be read: BadZipFile"),
        ((2**60).to_bytes(8, "little") + b"{}", "declares a header of 1152921504606846976 bytes"),
        ((2**63).to_bytes(8, "little") + b'{"a":1}', "declares a header"),
        ((2).to_bytes(8, "little") + b"{}", "holds no EfficientAD"),
        ((2).to_bytes(8, "little") + b"{[", "cannot be read: SafetensorError"),
        ((8).to_bytes(8, "little") + b"{" * 8, "cannot be read: SafetensorError"),
        (b"\x93NUMPY\x01\x00v\x00", "is a NumPy file"),
        (b"\x80", "bare pickle"),
    ],
)
def test_other_files(tmp_path, data, match):
    path = tmp_path / "some.file"
    path.write_bytes(data)
    for reader in (load, load_teacher):
        with pytest.raises(CheckpointError, match=match) as error:
            reader(path)
        assert "some.file" in str(error.value)


def test_the_legacy_format_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    message = r"torch\.save\(torch\.load\(f, map_location='cpu'"
    with pytest.raises(CheckpointError, match=message):
        load(path)
    path.rename(tmp_path / "teacher_final.pth")
    (tmp_path / "student_final.pth").touch()
    with pytest.raises(CheckpointError, match=r"teacher_final\.pth: is a bare pickle"):
        load(tmp_path)


def test_a_safetensors_bomb(tmp_path):
    """A header that declares a tensor of 4 TB."""
    header = (
        b'{"teacher.conv1.weight":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'
    )
    path = tmp_path / "x"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match="SafetensorError"):
        load(path)
    save_file({"teacher.conv1.weight": torch.ones(4, 3)}, path)
    with pytest.raises(CheckpointError, match="is not an EfficientAD"):
        load(path)


def test_folders(tmp_path):
    with pytest.raises(CheckpointError, match="a folder without a training"):
        load(tmp_path)
    (tmp_path / "student_final.pth").write_bytes(b"no")
    (tmp_path / "teacher_final.pth").mkdir()
    with pytest.raises(CheckpointError):
        load(tmp_path)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (np.ones(3), "holds an array"),
        (np.array([{}, {}], dtype=object), "holds an array"),
    ],
)
def test_npy_arrays(tmp_path, value, match):
    np.save(tmp_path / "x.npy", value, allow_pickle=True)
    with pytest.raises(CheckpointError, match=match):
        read_npy_object(tmp_path / "x.npy")


def test_npy_damage(tmp_path):
    """Truncated anywhere, or an array that declares more than its bytes."""
    path = tmp_path / "rximg" / "bottle_quantiles.npy"
    folder = foreign.rximg_folder(path.parent, foreign.anomalib_model(padding=True))
    good = path.read_bytes()
    for length in range(0, len(good), 97):
        path.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match="bottle_quantiles"):
            read_npy_object(path)
    path.write_bytes(good.replace(b"(K\x01M\x80\x01K\x01K\x01t", b"(K\x01M\xff\x7fK\x01K\x01t"))
    with pytest.raises(CheckpointError, match=r"bottle_quantiles\.npy: an array of shape"):
        load(folder)
    for values, match in (
        ({"qa_st": 0.5, "qb_st": 1.0}, "half-set"),
        ({"mean": np.ones(384, np.float32), "std": np.ones(384, np.int64)}, "not a float"),
        ({"mean": "high", "std": "low"}, "str is not a float"),
        ({"mean": np.ones(7), "std": np.ones(384)}, "mean has 7 entries"),
        ({"mean": np.full(384, np.nan), "std": np.ones(384)}, "mean has a NaN"),
    ):
        np.save(path, values)
        with pytest.raises(CheckpointError, match=match):
            load(folder)
    np.save(path, {"mean": np.ones(384, ">f8"), "std": np.ones((2, 192), np.float16).T})
    assert load(folder).has_statistics
