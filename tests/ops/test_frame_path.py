"""The frame path: against Pillow, torch and the definitions; levels, threads, forks."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficientad.ops import frame_path, native, reference
from efficientad.ops.frame_path import resize_pack

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
UNIT = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # the result is the level / 255
# Part of the values that may be a level of 255 off. Pillow sums integers, the frame path floats: a
# sum close to a half is rounded to another side. (Where a frame shrinks much more in height than in
# width Pillow 13 resizes columns first, and more values differ.) torch has weights of its own, in
# float32, whose place on the source is off by up to 16384 * 2^-24.
PILLOW, TORCH = 0.01, 0.1
HALF_STEP = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 0}
LEVELS = ("portable", "avx2", "avx512")
SENTINEL = 0x5A
needs_native = pytest.mark.skipif(not native.available(), reason="efficientad._native is not built")
BACKENDS = ["torch", pytest.param("native", marks=needs_native)]


def image(rng, height: int, width: int, grey: bool = False) -> np.ndarray:
    """Noise, or blocks of 0 and 255, so that edges are sharp."""
    shape = (height, width) if grey else (height, width, 3)
    if rng.random() < 0.5:
        return rng.integers(0, 256, shape, dtype=np.uint8)
    block = int(rng.integers(1, 40))
    small = rng.integers(
        0, 2, (-(-height // block), -(-width // block), *shape[2:]), dtype=np.uint8
    )
    return (small * 255).repeat(block, 0).repeat(block, 1)[:height, :width].copy()


def pitched(rng, frame: np.ndarray) -> np.ndarray:
    """The same frame as a window of a larger one."""
    left, right = rng.integers(1, 20, 2)
    around = np.full(
        (len(frame), frame.shape[1] + left + right, *frame.shape[2:]), SENTINEL, "uint8"
    )
    around[:, left:-right] = frame
    return around[:, left:-right]


def pillow(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    resized = Image.fromarray(frame).resize(size[::-1], Image.Resampling.BILINEAR)
    result = np.asarray(resized, dtype=np.float32)
    return result if result.ndim == 3 else np.repeat(result[..., None], 3, 2)


def side(rng, limit: int) -> int:
    """1 to `limit`, small sides more often."""
    return max(1, round(limit ** rng.random()))


@pytest.fixture
def level():
    """Sets the level of vector instructions; skips one that the processor does not have."""

    def choose(name: str) -> None:
        module = native.module()
        if module is None:
            pytest.skip("efficientad._native is not built")
        if name not in module.levels():
            pytest.skip(f"this processor has no {name} (it has {module.levels()})")
        module.set_level(name)

    yield choose
    if native.available():
        native.module().set_level("")


@needs_native
@pytest.mark.parametrize("seed", range(10))
def test_thirty_random_sizes_are_pillow(seed):
    rng, off, values = np.random.default_rng(seed), 0, 0
    for i in range(30):
        source = (5000, 4000) if (seed, i) == (0, 0) else (side(rng, 5000), side(rng, 4000))
        target = (256, 256) if i % 3 else (side(rng, 400), side(rng, 400))
        frame = image(rng, *source, grey=i % 5 == 1)
        border = int(rng.integers(0, 4)) if i % 4 == 3 else 0
        frame = pitched(rng, frame) if i % 2 else frame
        result = resize_pack(
            frame, target, **UNIT, channels=3 + i % 2, dtype=torch.float32, border=border
        ).numpy()
        inner = result[border : border + target[0], border : border + target[1], :3] * 255
        error = abs(inner - pillow(frame, target))
        assert error.max() <= 1.001, (source, target)
        if source[0] / target[0] <= 1.2 * source[1] / target[1]:
            off += int((error > 0.5).sum())
            values += error.size
        result[border : border + target[0], border : border + target[1], :3] = 0
        assert not result.any()  # the border and the fourth channel
    assert off <= PILLOW * values
    assert values


@needs_native
@pytest.mark.parametrize(
    ("source", "target"),
    [
        *[((1, 1), (1, 1)), ((1, 1), (9, 7)), ((2, 3), (1, 1)), ((16384, 2), (3, 2))],
        *[((3, 16384), (256, 256)), ((480, 640), (256, 256)), ((100, 90), (256, 300))],
        *[((7, 4001), (1, 2)), ((256, 300), (256, 256)), ((1300, 1100), (33, 1100))],
    ],
)
@pytest.mark.parametrize("grey", [False, True])
def test_native_is_torch(source, target, grey):
    rng = np.random.default_rng(1)
    frame = pitched(rng, image(rng, *source, grey))
    options = {"channels": 3, "dtype": torch.float32}
    native = resize_pack(frame, target, **UNIT, **options, backend="native")
    torch_ = resize_pack(frame, target, **UNIT, **options, backend="torch")
    error = (native - torch_).abs() * 255
    assert error.max() <= 1.001
    assert (error > 0.5).float().mean() <= TORCH


@needs_native
def test_taps_are_the_triangle_filter_in_float64():
    for source, target in [(1, 1), (7, 3), (3, 7), (640, 256), (2448, 256), (16384, 1), (255, 256)]:
        (_, _, width, _), (spans, weights) = frame_path.taps(source, target, torch.device("cpu"))
        ends = spans[:, 0] + spans[:, 1]
        assert (spans.diff(dim=0)[:, 0] >= 0).all()  # blocks of outputs read blocks of the source
        assert (ends.diff() >= 0).all()
        support = max(source / target, 1.0)
        cells = np.arange(source) + 0.5
        for i in range(target):
            want = np.maximum(0, 1 - abs(cells - (i + 0.5) * source / target) / support)
            first, count = spans[i].tolist()
            have = np.zeros(source)
            have[first : first + count] = weights[i, :count]
            assert count <= width
            # To 22 bits behind the point, as Pillow's.
            np.testing.assert_allclose(have, want / want.sum(), rtol=0, atol=2**-23 + 1e-9)
            assert (have * 2**22 == np.rint(have * 2**22)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("border", [0, 3])
@pytest.mark.parametrize("name", [*LEVELS, "torch"])
def test_a_frame_of_the_size_gives_the_bits_of_reference_pack(level, name, border, dtype):
    if name != "torch":
        level(name)
    rng = np.random.default_rng(2)
    mean, std = torch.tensor(MEAN), torch.tensor(STD)
    every = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for frame in (every, image(rng, 1, 1), image(rng, 5, 67), image(rng, 300, 2), every[:, :15]):
        want = reference.pack(
            torch.from_numpy(frame.copy())[None], mean, std,
            channels_last=True, border=border, dtype=dtype,
        )[0]  # fmt: skip
        backend = "torch" if name == "torch" else "native"
        for channels in (3, 4):
            have = resize_pack(
                frame, frame.shape[:2], mean, STD,
                border=border, channels=channels, dtype=dtype, backend=backend,
            )  # fmt: skip
            assert torch.equal(have, want[..., :channels])


@needs_native
def test_a_frame_of_the_size_gives_the_bits_of_the_triton_kernel(device):
    kernels = pytest.importorskip("efficientad.kernels.pack")
    frame = torch.from_numpy(image(np.random.default_rng(3), 19, 33)).to(device)
    mean, std = torch.tensor(MEAN, device=device), torch.tensor(STD, device=device)
    target = 80 if device == "cpu" else None
    want = kernels.pack(frame[None], mean, std, channels_last=True, border=2, target=target)[0]
    have = resize_pack(frame, (19, 33), MEAN, STD, border=2)
    assert torch.equal(have, want)


@pytest.mark.parametrize("name", LEVELS[1:])
def test_levels_give_the_same_bits(level, name):
    level(name)
    rng = np.random.default_rng(4)
    cases = [((31, 45), (16, 16)), ((1, 1), (3, 5)), ((200, 301), (64, 50)), ((97, 64), (97, 20))]
    for source, target in cases:
        for channels in (3, 4):
            for dtype in frame_path.KINDS:
                frame = pitched(rng, image(rng, *source, grey=channels == 3 and source[0] > 90))
                both = []
                for one in ("portable", name):
                    level(one)
                    options = {"channels": channels, "dtype": dtype, "border": 1}
                    both.append(resize_pack(frame, target, MEAN, STD, **options))
                assert torch.equal(*both), (source, target, dtype)


@needs_native
@pytest.mark.parametrize("name", LEVELS)
def test_float16_and_bfloat16_round_to_nearest_even(level, name):
    """Over subnormals, overflow to infinity and ties: mean and std move levels there."""
    level(name)
    frame = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    for std in (1.0, 3e-6, 1e-5, 1e4, 3e6, 1.6e7, 1e9):
        for mean in (0.0, 0.5, 1.0):
            three = ([mean] * 3, [std] * 3)
            wide = resize_pack(frame, (16, 16), *three, dtype=torch.float32)
            for dtype in (torch.float16, torch.bfloat16):
                have = resize_pack(frame, (16, 16), *three, dtype=dtype)
                assert torch.equal(have, wide.to(dtype)), (std, mean, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("channels", [3, 4])
def test_all_of_out_is_written_and_nothing_around_it(backend, channels):
    rng = np.random.default_rng(6)
    for dtype in frame_path.KINDS:
        for target, border in [((5, 7), 0), ((1, 1), 2), ((16, 8), 3), ((9, 33), 1)]:
            shape = (3, target[0] + 2 * border, target[1] + 2 * border, channels)
            batch = torch.full(shape, torch.nan, dtype=dtype)
            frame = image(rng, 40, 23)
            options = {"border": border, "channels": channels, "dtype": dtype, "backend": backend}
            result = resize_pack(frame, target, MEAN, STD, **options, out=batch[1])
            assert result.data_ptr() == batch[1].data_ptr()
            assert torch.equal(batch[1], resize_pack(frame, target, MEAN, STD, **options))
            assert batch[0].isnan().all()
            assert batch[2].isnan().all()


@needs_native
def test_layouts_of_a_frame_do_not_matter():
    rng = np.random.default_rng(7)
    frame = image(rng, 60, 50)
    want = resize_pack(frame, (20, 30), MEAN, STD)
    readonly = frame.copy()
    readonly.setflags(write=False)
    planes = torch.from_numpy(frame).permute(2, 0, 1).contiguous().permute(1, 2, 0)
    flipped = frame[::-1].copy()[::-1]
    bgr = np.ascontiguousarray(frame[..., ::-1])[..., ::-1]
    tensor = torch.from_numpy(pitched(rng, frame))
    for same in (readonly, planes, flipped, bgr, tensor, pitched(rng, frame)):
        assert torch.equal(resize_pack(same, (20, 30), MEAN, STD), want)
    row = frame[:1]
    assert torch.equal(
        resize_pack(torch.from_numpy(frame)[:1], (4, 5), MEAN, STD),
        resize_pack(row.copy(), (4, 5), MEAN, STD),
    )


@needs_native
def test_python_threads_at_once_and_any_number_of_workers():
    rng = np.random.default_rng(8)
    inputs = [image(rng, 600 + 37 * i, 900 - 29 * i) for i in range(6)]
    try:
        native.set_threads(1)
        want = [resize_pack(frame, (256, 256), MEAN, STD) for frame in inputs]
        wrong = []

        def work(turn: int) -> None:
            for i in range(30):
                k = (i + turn) % len(inputs)
                if turn == 0 and i % 7 == 0:
                    native.set_threads(1 + i % 5)
                if not torch.equal(resize_pack(inputs[k], (256, 256), MEAN, STD), want[k]):
                    wrong.append((turn, i))

        native.set_threads(4)
        threads = [threading.Thread(target=work, args=(turn,)) for turn in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong
        native.set_threads(3)
        assert native.info()["threads"] == 3
    finally:
        native.set_threads(0)


NO_THREADS = """
import resource
import numpy as np
from efficientad.ops import native
from efficientad.ops.frame_path import resize_pack
frame = np.arange(700 * 900 * 3, dtype=np.uint32).astype(np.uint8).reshape(700, 900, 3)
native.set_threads(1)
options = {"mean": (0, 0, 0), "std": (1, 1, 1)}
want = resize_pack(frame, (256, 256), **options)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**22, used + 2**22))  # a stack has 8 MB
native.set_threads(8)
assert (resize_pack(frame, (256, 256), **options) == want).all()
print("fine")
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_works_where_no_thread_can_be_started():
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # torch's own threads are not in question
    done = subprocess.run(
        [sys.executable, "-c", NO_THREADS], capture_output=True, text=True, env=environment
    )
    assert done.stdout == "fine\n", done.stderr


def _in_child(frame, queue) -> None:
    queue.put(resize_pack(frame, (256, 256), MEAN, STD).numpy())


@needs_native
def test_works_after_fork():
    frame = image(np.random.default_rng(9), 700, 900)  # enough for threads
    native.set_threads(3)
    try:
        want = resize_pack(frame, (256, 256), MEAN, STD).numpy()
        context = multiprocessing.get_context("fork")
        queue = context.Queue()
        child = context.Process(target=_in_child, args=(frame, queue))
        child.start()
        np.testing.assert_array_equal(queue.get(timeout=30), want)
        child.join(30)
        assert child.exitcode == 0
    finally:
        native.set_threads(0)


FRAME = np.zeros((4, 5, 3), np.uint8)
BAD = [
    ({"frame": np.zeros((4, 5, 4), np.uint8)}, r"frame is uint8 \(4, 5, 4\)"),
    ({"frame": np.zeros((4, 5, 3), np.float32)}, r"frame is float32 .* must be uint8"),
    ({"frame": np.zeros((0, 5, 3), np.uint8)}, r"frame is uint8 \(0, 5, 3\)"),
    ({"size": (0, 3)}, r"size is \(0, 3\); it must be \(height, width\)"),
    ({"size": (3,)}, r"size is \(3,\)"),
    ({"mean": (0.0, 1.0)}, r"mean is \[0.0, 1.0\]; it must be 3 finite"),
    ({"std": (1.0, 0.0, 1.0)}, r"std is .* above 0"),
    ({"mean": (0.0, np.nan, 1.0)}, "mean is .* finite"),
    ({"mean": torch.zeros(3, device="meta")}, "mean is on meta"),
    ({"border": -1}, "border is -1"),
    ({"channels": 5}, "channels is 5; it must be 3 or 4"),
    ({"dtype": torch.float64}, r"dtype is torch.float64"),
    ({"backend": "cuda"}, "backend is 'cuda'"),
    ({"out": torch.zeros(2, 2, 3)}, r"out is torch.float32 \(2, 2, 3\) .* must be torch.float16"),
    ({"out": torch.zeros(2, 4, 3, dtype=torch.float16).transpose(1, 2)}, "out is|out has strides"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_arguments_of_resize_pack_are_named(change, message):
    good = {"frame": FRAME, "size": (3, 4), "mean": MEAN, "std": STD}
    resize_pack(**good)
    with pytest.raises(ValueError, match=message):
        resize_pack(**good | change)


def test_without_the_compiled_module(monkeypatch):
    with pytest.raises(ValueError, match="count is -1"):
        native.set_threads(-1)
    monkeypatch.setattr(native, "_native", None)
    assert not native.available()
    assert native.info()["available"] is False
    with pytest.raises(ValueError, match=r"backend is 'native', but .*pip install"):
        resize_pack(FRAME, (3, 4), MEAN, STD, backend="native")
    assert resize_pack(FRAME, (3, 4), MEAN, STD).shape == (3, 4, 4)
