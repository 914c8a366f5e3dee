"""Kernel bundles as files: read back equal, and every damaged or foreign one refused by name."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import re

import pytest
import torch
import triton

from efficientad.fast import options, self_check
from efficientad.ops import cuda_driver, kernel_bundle
from efficientad.ops.kernel_bundle import (
    Bundle,
    BundleError,
    CompiledKernel,
    read_bundle,
    source_digest,
    write_bundle,
)
from efficientad.ops.kernel_launch import BundleLaunch, open_bundle

MAP = {"swizzle": 3, "elem_size": 2, "elem_type": 6, "block_size": [128, 64]}
CUDA = torch.device("cuda", 0)


def bundle(**changes) -> Bundle:
    kernels = {
        "a": CompiledKernel("_a", "_a", 4, 16, ((0, "*fp16"), (2, "i32")), b"\x7fELF one"),
        "b": CompiledKernel("_b", "_b_0", 8, 99, ((0, "*fp16"), (1, MAP)), b"\x7fELF other"),
        "c": CompiledKernel("_a", "_a", 4, 16, ((0, "*fp16"),), b"\x7fELF one"),
    }
    made = Bundle(90, triton.__version__, source_digest(), {"dtype": "float16"}, kernels)
    return dataclasses.replace(made, **changes)


@pytest.fixture
def path(tmp_path):
    write_bundle(bundle(), tmp_path / "some.kernels")
    return tmp_path / "some.kernels"


def test_a_bundle_is_read_back_equal(path):
    assert read_bundle(path) == bundle()
    assert kernel_bundle.is_bundle(path)
    assert read_bundle(path).facts() == {
        "kernels": "3 for sm_90, 0.0 MB", "triton": triton.__version__, "dtype": "float16"
    }  # fmt: skip


def test_a_flipped_byte_and_a_cut_anywhere_are_refused(path):
    whole = path.read_bytes()
    for place in range(0, len(whole), 13):
        for damaged in (
            whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :],
            whole[:place],
        ):
            path.write_bytes(damaged)
            with pytest.raises(BundleError, match=f"kernel bundle {re.escape(str(path))} "):
                read_bundle(path)


def test_what_is_no_bundle_is_refused(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere is not a file"):
        read_bundle(tmp_path / "nowhere")
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="cannot be read"):
        read_bundle(path)
    path.write_text(json.dumps({}))
    with pytest.raises(BundleError, match="cannot be read"):
        read_bundle(path)
    assert not kernel_bundle.is_bundle(path)


def test_a_file_larger_than_any_bundle_is_not_read(path, monkeypatch):
    with open(path, "r+b") as file:
        file.truncate(kernel_bundle.MOST_BYTES + 1)  # sparse
    monkeypatch.setattr(kernel_bundle, "safe_open", None)
    with pytest.raises(BundleError, match="has 268 MB; a kernel bundle has at most 268 MB"):
        read_bundle(path)


def test_a_header_that_promises_more_than_the_file_holds_is_refused(path):
    whole = path.read_bytes()
    path.write_bytes((1 << 40).to_bytes(8, "little") + whole[8:])
    with pytest.raises(BundleError, match="cannot be read"):
        read_bundle(path)


def test_another_format_version_is_refused(path, monkeypatch):
    monkeypatch.setattr(kernel_bundle, "FORMAT_VERSION", "2")
    with pytest.raises(BundleError, match="has format version '1' and this efficientad reads '2'"):
        read_bundle(path)


FOREIGN = {
    "arch": ({"arch": 80}, "is for sm_80 and the device is sm_90; make it anew with"),
    "triton": ({"triton": "3.0.0"}, "was compiled by Triton 3.0.0 and "),
    "source": ({"source": "0" * 64}, "was compiled from other kernels than this efficientad has"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_bundle_is_refused_with_its_sentence(what, path, monkeypatch):
    changes, sentence = FOREIGN[what]
    write_bundle(bundle(**changes), path)
    with pytest.raises(BundleError, match=sentence):
        open_bundle(path, 90)
    # The predictor says so and goes on without it.
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with pytest.warns(UserWarning, match=f"{sentence}.*The kernels are compiled here"):
        way, remark = options.choose_bundle(path, CUDA)
    assert way is None
    assert sentence in remark


def test_the_digest_of_the_sources_sees_each_file(tmp_path, monkeypatch):
    from efficientad import kernels

    monkeypatch.setattr(kernels, "__path__", [str(tmp_path)])
    digest = source_digest.__wrapped__
    seen = [digest()]
    for name, text in (("a.py", "x"), ("a.py", "y"), ("b.py", "y"), ("note.txt", "y")):
        (tmp_path / name).write_text(text)
        seen.append(digest())
    assert len(set(seen[:4])) == 4
    assert seen[4] == seen[3]


def test_the_argument_goes_before_the_environment(path, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.delenv(options.BUNDLE, raising=False)
    assert options.choose_bundle(None, CUDA) == (None, None)
    monkeypatch.setenv(options.BUNDLE, str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"EFFICIENTAD_BUNDLE is '.*nowhere'; there is no"):
        options.choose_bundle(None, CUDA)
    way, remark = options.choose_bundle(path, CUDA)
    assert isinstance(way, BundleLaunch)
    assert (way.path, remark) == (path, None)
    monkeypatch.setenv(options.BUNDLE, str(path))
    assert options.choose_bundle(None, CUDA)[0].path == path
    way, remark = options.choose_bundle(None, torch.device("cpu"))
    assert (way, remark) == (None, f"{path}: not used, since the device is cpu")
    with pytest.raises(FileNotFoundError, match="bundle is 'x'"):
        options.choose_bundle("x", torch.device("cpu"))


class Backend:
    """Stands in for `KernelBackend`."""

    def __init__(self, detector, dtype, device, kernels):
        self.way = kernels._way


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_kernels_of_a_bundle_that_fail_are_compiled_in_its_place(
    failing, path, monkeypatch, recwarn
):
    tried = []

    def check(backend, *rest):
        tried.append(backend.way)
        return "they are wrong" if len(tried) <= failing else None

    monkeypatch.setattr(self_check, "KernelBackend", Backend)
    monkeypatch.setattr(self_check, "self_check", check)
    way = open_bundle(path, 90)

    def build():
        arguments = (None, torch.float16, torch.device("cpu"), "triton", (1,))
        return self_check.build_backend(*arguments, bundle=way)

    if failing < 2:
        backend, reason = build()
        assert (backend.way, reason) == ((way, None)[failing], None)
    else:
        with pytest.raises(ValueError, match="the kernels cannot be used: they are wrong"):
            build()
    assert tried == [way, None][: 1 + failing]
    said = [str(w.message) for w in recwarn]
    if failing:
        assert way.described() == f"{path}: not used: they are wrong"
        sentence = (
            f"kernel bundle {path} is not used: they are wrong. The kernels are compiled here"
        )
        assert said == [sentence]
    else:
        assert (way.described(), said) == (f"{path}: 0 kernels launched from it", [])


class Driver:
    """A driver that writes down what it is asked for, and fails where it is told."""

    def __init__(self, fails: int = 0):
        self.fails, self.seen = fails, []

    def __getattr__(self, name):
        def call(*args):
            self.seen.append((name, args))
            return self.fails

        return call

    def cuGetErrorString(self, code, text):
        text._obj.value = b"out of luck"

    def cuDriverGetVersion(self, version):
        version._obj.value = self.version
        return 0


@pytest.mark.parametrize(("version", "rows", "left"), [(13010, 64, 0), (13020, 64, 1),
                                                       (13010, 4096, 1)])  # fmt: skip
def test_maps_of_small_matrices_are_corrected_for_old_drivers(version, rows, left, monkeypatch):
    driver = Driver()
    driver.version = version
    monkeypatch.setattr(cuda_driver, "library", lambda: driver)
    words = (ctypes.c_uint64 * 16)(0, 1 << 21 | 5)
    cuda_driver.encode_map(ctypes.addressof(words), 4096, [rows, 64], [64, 1], MAP)
    assert list(words)[:3] == [0, left << 21 | 5, 0]
    (name, args), *_ = driver.seen
    assert name == "cuTensorMapEncodeTiled"
    assert [list(a) for a in args[4:8]] == [[64, rows], [128, 0], [64, 128], [1, 1]]


def test_the_drivers_words_are_in_the_error(monkeypatch):
    monkeypatch.setattr(cuda_driver, "library", lambda: Driver(fails=700))
    arguments = cuda_driver.Arguments()
    with pytest.raises(RuntimeError, match=r"CUDA driver: a launch: out of luck \(700\)"):
        cuda_driver.launch(ctypes.c_void_p(1), 1, 4, 0, 0, arguments)
