"""A training step as one CUDA graph. NOT YET RUN.

Losses, backward pass and optimiser are captured once and replayed: fixed shapes, inputs copied into
fixed buffers, the learning rate in a tensor. Dropout draws from the device's default generator,
whose seed is read at every replay, so that seeding before the replay decides the masks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from efficientad.training.losses import StepInputs
from efficientad.utils.cuda_graphs import captured

_WARM_UP = 3  # eager steps before the capture: libraries choose and load their kernels


class GraphStep:
    """step(inputs) -> losses (4,), as the eager step that it was made from.

    Args:
        eager: inputs -> losses, with backward pass and optimiser step inside; it leaves gradients
            as None. optimizer: Adam with capturable=True and a tensor learning rate.
        parameters: all that the optimiser changes. example: inputs of the fixed shapes.

    The warm-up changes weights and optimiser state; both are put back, in place.
    """

    def __init__(
        self,
        eager: Callable[[StepInputs], Tensor],
        optimizer: torch.optim.Optimizer,
        parameters: list[Tensor],
        example: StepInputs,
    ) -> None:
        copies: list[Any] = [None if t is None else t.clone() for t in example]
        self._inputs = StepInputs(*copies)
        weights = [p.detach().clone() for p in parameters]
        state = {
            p: {k: v.clone() for k, v in optimizer.state[p].items()}
            for p in parameters
            if p in optimizer.state
        }
        device = example.image.device
        stream = torch.cuda.Stream(device)
        caller = torch.cuda.current_stream(device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):  # and its device, whichever is current
            for _ in range(_WARM_UP):
                eager(self._inputs)
        self._graph = torch.cuda.CUDAGraph()
        with captured(self._graph, stream):
            self._losses = eager(self._inputs)
        caller.wait_stream(stream)
        with torch.no_grad():
            for parameter, value in zip(parameters, weights, strict=True):
                parameter.copy_(value)
                for key, now in optimizer.state[parameter].items():
                    before = state.get(parameter, {}).get(key)
                    now.zero_() if before is None else now.copy_(before)

    def __call__(self, inputs: StepInputs) -> Tensor:
        """Losses of the step; the tensor is overwritten by the next one."""
        for buffer, value in zip(self._inputs, inputs, strict=True):
            if buffer is not None and value is not None:
                buffer.copy_(value, non_blocking=True)
        with torch.cuda.device(self._losses.device):
            self._graph.replay()
        return self._losses
