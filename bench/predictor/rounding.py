"""Where a low precision's error comes from: `python -m bench.predictor.rounding MODEL FOLDER...`.

Simulated: filters and inputs of the layers named are rounded, all else is float32. Measures errors,
not times; docs/precision.md keeps what it prints.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from efficientad.checkpoint.loading import load
from efficientad.fast.backends import TorchBackend
from efficientad.fast.folded_network import FoldedNetwork
from efficientad.fast.predictor import FastPredictor
from efficientad.model.agreement import scale_of
from efficientad.model.detector import EfficientAD

Round = Callable[[Tensor], Tensor]
_FIRST, _LAST = ("teacher1", "student1"), ("st", "ae")


def one(x: Tensor) -> Tensor:
    """As one bfloat16 number."""
    return x.bfloat16().float()


def two(x: Tensor) -> Tensor:
    """As the sum of two bfloat16 numbers."""
    return one(x) + one(x - one(x))


def half(x: Tensor) -> Tensor:
    """As one float16 number."""
    return x.half().float()


def eight(x: Tensor) -> Tensor:
    """In 8 bits: filters with a scale per output channel, activations with one per picture.

    A calibrated scale per layer, as a processor's int8 would have it, can only be coarser.
    """
    steps = 255 if float(x.min()) >= 0 else 127  # behind a ReLU there is no sign
    scale = (x.abs().amax((1, 2, 3), keepdim=True) / steps).clamp(min=1e-12)
    return (x / scale).round() * scale


def rounded_predictor(detector: EfficientAD, rounds: dict[str, Round]) -> FastPredictor:
    """A float32 predictor in which filters and inputs of the layers in `rounds` are rounded."""

    class Network(FoldedNetwork):
        def _compiled(self, tensors: dict[str, Tensor]) -> None:
            return None

        def _conv(self, x: Tensor, name: str, *, padding: int = 0, relu: bool = False) -> Tensor:
            x = rounds[name](x) if name in rounds else x
            return super()._conv(x, name, padding=padding, relu=relu)

    class Backend(TorchBackend):
        def __init__(self, detector: EfficientAD, dtype: torch.dtype, device: torch.device) -> None:
            super().__init__(detector, dtype, device)
            self.network = Network(detector, dtype, device)
            with torch.no_grad():
                buffers = dict(self.network.named_buffers())
                for name, to in rounds.items():
                    weight = buffers.get(f"{name}_weight")
                    if weight is not None:  # shared inner layers are there once
                        weight.copy_(to(weight))

    class Predictor(FastPredictor):
        torch_backend = Backend

    return Predictor(detector, device="cpu", dtype="float32", backend="torch")


def cases(detector: EfficientAD) -> dict[str, dict[str, Round]]:
    """What is rounded, by the words of the table."""
    inner = len(detector.teacher.layers()) - 1
    layers = [tuple(f"{name}{i}" for name in ("teacher", "student")) for i in range(1, inner + 1)]
    layers.append(_LAST)
    names = [name for layer in layers for name in layer]
    found: dict[str, dict[str, Round]] = {"all, bfloat16": dict.fromkeys(names, one)}
    for i, layer in enumerate(layers, start=1):
        found[f"layer {i} alone, bfloat16"] = dict.fromkeys(layer, one)
    first = found["all, bfloat16"] | dict.fromkeys(_FIRST, two)
    found["all, bfloat16, layer 1 as two numbers"] = first
    found["the same, the last layer as two, too"] = first | dict.fromkeys(_LAST, two)
    found["all as two numbers"] = dict.fromkeys(names, two)
    found["all, float16"] = dict.fromkeys(names, half)
    best = found["all, bfloat16, layer 1 as two numbers"]
    inner_names = [name for layer in layers[1:-1] for name in layer]
    found["layer 2 in 8 bits, the others as best"] = best | dict.fromkeys(layers[1], eight)
    found["inner layers in 8 bits, the others as best"] = best | dict.fromkeys(inner_names, eight)
    most = dict.fromkeys([*inner_names, *_LAST], eight)
    found["inner and last layers in 8 bits, the first as best"] = best | most
    return found


def run(detector: EfficientAD, folder: Path) -> list[str]:
    """Lines of the table for the pictures of a folder."""
    paths = sorted(folder.iterdir())

    def results(rounds: dict[str, Round]) -> tuple[Tensor, Tensor]:
        predictor = rounded_predictor(detector, rounds)
        found = [predictor(path) for path in paths]
        scores, maps = (
            torch.stack([getattr(p, n) for p in found]) for n in ("score", "anomaly_map")
        )
        return scores, maps

    score, anomaly_map = results({})
    scale = scale_of(anomaly_map)
    lines = []
    for name, rounds in cases(detector).items():
        scores, maps = results(rounds)
        difference = (maps - anomaly_map) / scale
        of_score = float((scores - score).abs().max()) / scale
        lines.append(
            f"| {folder.name} | {name} | {float(difference.abs().max()):.1e} "
            f"| {float(difference.square().mean().sqrt()):.1e} | {of_score:.1e} |"
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="detector file")
    parser.add_argument("folders", nargs="+", type=Path, help="of pictures, and nothing else")
    options = parser.parse_args(arguments)
    detector = load(options.model)
    print("| pictures | rounded | map, largest | map, RMS | score, largest |")
    print("|---|---|---|---|---|")
    for folder in options.folders:
        print("\n".join(run(detector, folder)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
