"""One launch of a fused operation, its definition, its peers.

See `cases` for the launches of the networks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.kernels import plain_torch
from efficientad.ops import fused, operators, reference


@dataclass
class Case:
    """One launch.

    Attributes:
        operation: of `efficientad.ops.fused`. layer: its place, "conv2", "e3", "d6".
        size: "S", "M" or `shapes.BOTH`.
        dtype: of the activations.
        arguments, options: of the operation.
        flop: needed operations, a multiplication and an addition being two; 0 where none matter.
        needed: rows and columns of the result that a kernel must write; None: all.
        small: not the real shape but a smaller one.
    """

    operation: str
    layer: str
    size: str
    batch: int
    dtype: torch.dtype
    arguments: tuple
    options: dict[str, Any] = field(default_factory=dict)
    flop: int = 0
    needed: tuple[Tensor, Tensor] | None = None
    small: bool = False

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def definition(self) -> list[Tensor]:
        """The result by `efficientad.ops.reference`, in float32 and rounded once.

        cuDNN does not search for its fastest algorithm for it.
        """
        before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
        try:
            return _tensors(getattr(reference, self.operation)(*self.arguments, **self.options))
        finally:
            torch.backends.cudnn.benchmark = before

    def launch(self, tile: Any = None) -> tuple[Callable[[], object], list[Tensor]]:
        """(the kernel's launch, its results), which are NaN until it has run."""
        kernel = operators.kernel(self.operation)
        options = dict(self.options) if tile is None else {**self.options, "tile": tile}
        out = kernel(*self.arguments, **options)
        for tensor in _tensors(out):
            tensor.copy_(torch.full_like(tensor, torch.nan, dtype=torch.float32))

        def launch() -> None:
            kernel(*self.arguments, **options, out=out)

        return launch, _tensors(out)

    def through_ops(self, backend: str) -> tuple[Callable[[], object], list[Tensor]]:
        """(the checked operation on a backend, its results)."""
        operation = getattr(fused, self.operation)

        def call() -> object:
            return operation(*self.arguments, **self.options, backend=backend)

        return call, _tensors(call())

    def plain_torch(
        self, channels_last: bool, wrap: Callable[[Callable], Callable] = lambda f: f
    ) -> tuple[Callable[[], object], list[Tensor]]:
        """(the expression in plain torch, its results in the kernel's layout).

        wrap: around the expression, such as torch.compile.
        """
        function, inputs, options = plain_torch.expression(self, channels_last)
        function = wrap(function)

        def call() -> object:
            return function(*inputs, **options)

        out = _tensors(call())
        return call, [t.permute(0, 2, 3, 1) if t.dim() == 4 else t for t in out]

    def whole(self, results: list[Tensor]) -> list[Tensor]:
        """Results as they are compared: maps summed over their parts, what is needed, float32."""
        if self.operation == "pair_distance":
            results = [m.sum(0) if m.dim() == 4 else m for m in results]
        if self.operation == "pack":
            results = [x[..., :3] for x in results]
        if self.needed is not None:
            rows, cols = (index.long() for index in self.needed)
            results = [y[:, rows][:, :, cols] for y in results]
        return [t.float() for t in results]

    def errors(self, got: list[Tensor], want: list[Tensor]) -> tuple[float, float]:
        """(greatest, RMS) difference as parts of the result's greatest value; NaN is infinite."""
        worst = [0.0, 0.0]
        for a, b in zip(self.whole(got), self.whole(want), strict=True):
            if a.shape != b.shape:
                raise ValueError(f"the result has shape {tuple(a.shape)}, not {tuple(b.shape)}")
            scale = float(b.abs().max())
            difference = (a - b) / (scale or 1.0)
            for i, value in enumerate((difference.abs().max(), difference.square().mean().sqrt())):
                worst[i] = max(worst[i], float(torch.nan_to_num(value, nan=torch.inf)))
        return worst[0], worst[1]

    def nbytes(self, results: list[Tensor]) -> int:
        """Bytes that must move: every input read once and every result written once."""
        inputs = _tensors((self.arguments, tuple(self.options.values())))
        seen = {(t.data_ptr(), t.numel()): t.numel() * t.itemsize for t in inputs}
        return sum(seen.values()) + sum(t.numel() * t.itemsize for t in results)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [tensor for part in value for tensor in _tensors(part)]
    return []
