"""Arguments of the PDN kernels inside guarded memory, and the comparison of their results."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

F16, BF16, F8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
# Greatest and RMS error, as parts of the result's greatest value, by the result's dtype.
TOLERANCE = {
    torch.float32: (2e-3, 3e-4),  # maps, from fp16 inputs
    F16: (2e-3, 3e-4),
    BF16: (8e-3, 2e-3),
    F8: (7e-2, 2e-2),  # half a step of a 3-bit mantissa
}
GUARD = 2048  # elements on either side of a guarded tensor
SENTINEL = 7.0


class Memory:
    """Triton's interpreter with its accesses watched: none may touch a guard.

    A value that is read out of bounds and then masked away changes no result, so numbers alone
    would not show it.
    """

    def __init__(self, interpreter):
        self.interpreter = interpreter
        self.first_store = None  # address of the first element that is stored

    def __getattr__(self, name):
        return getattr(self.interpreter, name)

    def check(self, pointers, mask) -> None:
        touched = pointers[mask].astype(np.int64)
        for guarded in Guarded.all:
            low, high = guarded.span(guarded.tensor)
            start, end = guarded.span(guarded.buffer)
            stray = (touched >= start) & (touched < end) & ((touched < low) | (touched >= high))
            assert not stray.any(), "a guard was touched"

    def load(self, pointers, mask, *rest):
        self.check(pointers, mask)
        return self.interpreter.load(pointers, mask, *rest)

    def store(self, pointers, values, mask):
        self.check(pointers, mask)
        if self.first_store is None and mask.any():
            self.first_store = int(pointers[mask][0])
        return self.interpreter.store(pointers, values, mask)


class Guarded:
    """`tensor`, filled with `inside`, in the middle of a buffer of `around`."""

    all: ClassVar[list[Guarded]] = []  # of the running test

    def __init__(self, shape, dtype, device, inside=float("nan"), around=float("nan")):
        size = torch.Size(shape).numel()
        self.buffer = torch.full((size + 2 * GUARD,), around, device=device).to(dtype)
        self.tensor = self.buffer[GUARD : GUARD + size].view(shape)
        self.tensor.copy_(torch.full(shape, inside, device=device).to(dtype))
        self.around = around
        self.all.append(self)

    @staticmethod
    def span(tensor: Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize

    def check(self) -> Tensor:
        """The tensor, every element of it written and none beside it."""
        edges = torch.cat([self.buffer[:GUARD], self.buffer[-GUARD:]]).float()
        assert (edges == self.around).all(), "written outside the result"
        assert not self.tensor.isnan().any(), "not written, or computed from what must not be read"
        return self.tensor


def place(values: Tensor, device) -> Tensor:
    """`values` in the middle of a buffer of NaN."""
    guarded = Guarded(values.shape, values.dtype, device)
    guarded.tensor.copy_(values)
    return guarded.tensor


def result(shape, dtype, device) -> Guarded:
    return Guarded(shape, dtype, device, around=SENTINEL)


def joined(tensors: list[Tensor], device) -> list[Tensor]:
    """Consecutive views of one buffer."""
    return list(place(torch.cat(tensors), device).split([len(t) for t in tensors]))


def close(got, want) -> None:
    got, want = (list(t) if isinstance(t, (list, tuple)) else [t] for t in (got, want))
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert a.dtype == b.dtype
        greatest, rms = TOLERANCE[a.dtype]
        a, b = a.double().cpu(), b.double().cpu()
        scale = b.abs().max().item()
        error = (a - b).abs()
        assert scale > 0
        assert error.max().item() <= greatest * scale
        assert error.square().mean().sqrt().item() <= rms * scale


def random(generator, *shape, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=generator) * scale


def layer(n, h, w, cin, couts, k, device, dtype=F16, seed=0) -> dict:
    """Arguments of a grouped convolution whose networks differ."""
    g = torch.Generator().manual_seed(seed)
    std = (k * k * cin) ** -0.5
    return {
        "x": [place(random(g, n, h, w, cin).relu().to(dtype), device) for _ in couts],
        "weight": joined([random(g, c, k, k, cin, scale=std).to(dtype) for c in couts], device),
        "bias": joined([random(g, c, scale=0.3) for c in couts], device),
    }


def first_layer(n, h, w, couts, device, seed=0) -> dict:
    arguments = layer(n, h, w, 4, couts, 4, device, seed=seed)
    x = arguments["x"][0]
    x[..., 3] = 0
    return {**arguments, "x": x}


def pair_arguments(n, h, w, ct, cs, ca, k, c, device, dtype=F16, seed=0) -> dict:
    g = torch.Generator().manual_seed(seed)
    oh, ow = h - k + 1, w - k + 1

    def filters(rows, size, channels, kind):
        weight = random(g, rows, size, size, channels, scale=(size * size * channels) ** -0.5)
        return place(weight.to(kind), device)

    decoder = F16 if dtype == F8 else dtype
    return {
        "teacher": place(random(g, n, h, w, ct).relu().to(dtype), device),
        "student": place(random(g, n, h, w, cs).relu().to(dtype), device),
        "autoencoder": place(random(g, n, oh, ow, ca).relu().to(decoder), device),
        "weight_teacher": filters(c, k, ct, dtype),
        "weight_student": filters(2 * c, k, cs, dtype),
        "weight_autoencoder": filters(c, 3, ca, decoder),
        "bias": place(random(g, 2 * c, scale=0.3), device),
    }
