"""The forward pass out of fused operations.

`operations` is anything with the functions of `efficientad.ops.reference`: that module,
`efficientad.ops.fused`, or `Kernels`, which calls the Triton kernels straight. Given a `Workspace`,
results go to buffers that are allocated once, as a CUDA graph needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from efficientad.fast.folding import FoldedWeights
from efficientad.model.networks import PDN_LAYERS, decoder_sizes, feature_size
from efficientad.ops.reference import resize_reads

Run = Callable[..., Any]  # (name, operation, *arguments, **options) -> the operation's result


def run_plainly(name: str, operation: Callable, *arguments, **options):
    """Call an operation and let it allocate its result."""
    return operation(*arguments, **options)


class Workspace:
    """Results of operations in buffers that are kept and shared between batch sizes.

    The first run, with the largest batch, lets every operation allocate its result and keeps it;
    later runs write to the first images of the same buffers.
    """

    def __init__(self) -> None:
        self._kept: dict[str, list[Tensor]] = {}

    def runner(self, images: int) -> Run:
        """`run` for a batch of `images`, at most as many as in the first run."""

        def run(name: str, operation: Callable, *arguments, **options):
            kept = self._kept.get(name)
            if kept is None:
                result = operation(*arguments, **options)
                self._kept[name] = list(result) if isinstance(result, (list, tuple)) else [result]
                return result
            views = [t[:images] for t in kept]
            grouped = isinstance(arguments[1], list)  # the second argument holds the filters
            return operation(*arguments, **options, out=views if grouped else views[0])

        return run

    def bytes(self) -> int:
        """Memory of the kept buffers."""
        return sum(t.numel() * t.itemsize for kept in self._kept.values() for t in kept)


class Plan:
    """What the forward pass of one network at one input size needs beside the weights.

    Args:
        size: "S" or "M".
        padding: whether the PDN is the padded one.
        image_size: (height, width) of the network's input, each >= 256.
        map_padding: cells put around a map before it is resized.
        device: where the tables go.
    """

    def __init__(
        self,
        size: str,
        padding: bool,
        image_size: tuple[int, int],
        map_padding: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self.layers = PDN_LAYERS[size]
        self.padding = padding
        self.image_size = image_size
        self.map_padding = map_padding
        self.border = self.layers[0].padding if padding else 0
        self.feature_size = tuple(feature_size(length, padding) for length in image_size)
        axes = [decoder_sizes(length, padding) for length in image_size]
        self.decoder_sizes = list(zip(*axes, strict=True))
        # Only what the last resize reads of the sixth decoder layer is computed.
        self.needed = [
            torch.tensor(resize_reads(sizes[5] + 1, sizes[6]), dtype=torch.int32, device=device)
            for sizes in axes
        ]


def trunk(plan: Plan, weights: FoldedWeights, packed: Tensor, operations, run: Run) -> list[Tensor]:
    """Teacher and student up to their last layer: packed image -> per network (N, h, w, C)."""
    pool_padding = int(plan.padding)
    read = [filters[0].dtype for filters, _ in weights.trunk] + [weights.last[0].dtype]
    x = run("trunk1", operations.first_conv_relu_pool, packed, *weights.trunk[0],
            pool_padding=pool_padding, out_dtype=read[1])  # fmt: skip
    for i, row in list(enumerate(plan.layers[:-1], start=1))[1:]:
        name, layer = f"trunk{i}", weights.trunk[i - 1]
        options = {"padding": row.padding if plan.padding else 0, "out_dtype": read[i]}
        options["scale"] = weights.trunk_scales[i - 1]
        if row.pool:  # the quarter is in the weights
            options |= {"pool_padding": pool_padding, "pool_scale": 1.0}
            x = run(name, operations.conv_relu_pool, x, *layer, **options)
        else:
            x = run(name, operations.conv_relu, x, *layer, **options)
    return x


def autoencoder(plan: Plan, weights: FoldedWeights, packed: Tensor, operations, run: Run) -> Tensor:
    """The autoencoder up to its last layer: packed image -> (N, h, w, 64) on the PDN's grid."""
    border = plan.border
    y = packed[:, border : packed.shape[1] - border, border : packed.shape[2] - border]
    for i in range(5):
        y = run(f"encoder{i + 1}", operations.strided_conv_relu, y, *weights.encoder[i])
    if tuple(y.shape[1:3]) == (8, 8):
        layers = (*weights.encoder[5], *weights.decoder[0])
        y = run("bottleneck", operations.bottleneck, y, *layers)
    else:
        y = run(
            "encoder6", operations.strided_conv_relu, y, *weights.encoder[5],
            stride=1, padding=0, relu=False,
        )  # fmt: skip
        size = plan.decoder_sizes[0]
        y = run("decoder1", operations.resize_conv_relu, y, *weights.decoder[0], size)
    for i in range(2, 8):
        options: dict[str, Any] = {"padding": 2 if i < 7 else 1}
        if i == 6:
            options |= {"rows": plan.needed[0], "cols": plan.needed[1]}
        size, layer = plan.decoder_sizes[i - 1], weights.decoder[i - 1]
        y = run(f"decoder{i}", operations.resize_conv_relu, y, *layer, size, **options)
    return y


def distance_maps(
    weights: FoldedWeights, features: list[Tensor], decoded: Tensor, operations
) -> tuple[Tensor, Tensor]:
    """Last layer of all networks: two maps (P, N, h, w), P partial maps that sum to the map."""
    return operations.pair_distance(*features, decoded, *weights.last, scale=weights.last_scale)


def distance_maps_in_turn(
    weights: FoldedWeights,
    features: list[Tensor],
    decoded: Tensor,
    operations,
    join: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """`distance_maps` in two launches, the first of which does not wait for the autoencoder.

    Args:
        join: called between the two; what follows it comes after the autoencoder.
    """
    teacher, student, autoencoder, bias = weights.last
    scale = weights.last_scale
    st, second = operations.student_distance(*features, teacher, student, bias, scale=scale)
    join()
    return st, operations.autoencoder_distance(decoded, second, autoencoder, bias, scale=scale)


def forward(
    plan: Plan, weights: FoldedWeights, packed: Tensor, operations, run: Run = run_plainly
) -> tuple[Tensor, Tensor]:
    """Packed image (N, H, W, 4) -> distance maps (P, N, h, w), one operation after the other."""
    decoded = autoencoder(plan, weights, packed, operations, run)
    features = trunk(plan, weights, packed, operations, run)
    return distance_maps(weights, features, decoded, operations)
