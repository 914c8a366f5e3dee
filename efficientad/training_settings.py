"""Floor 1, imports losses only: the settings of a training, checked."""

from __future__ import annotations

from dataclasses import dataclass

from efficientad.losses import HARD_QUANTILE


class TrainingError(ValueError):
    """A training that cannot go on, or a state that does not belong to it."""


@dataclass(frozen=True)
class Settings:
    """What the result of a training depends on, beside networks and pictures; see `fit`."""

    steps: int = 70_000
    batch_size: int = 1
    seed: int = 42
    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    hard_quantile: float = HARD_QUANTILE
    dtype: str = "float32"
    log_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "log_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; it must be an integer >= 1")
        if not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, weight_decay is {self.weight_decay}; the "
                "first must be > 0, the second >= 0"
            )
        if not 0 <= self.hard_quantile < 1:
            raise ValueError(f"hard_quantile is {self.hard_quantile}; it must be in [0, 1)")
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype is {self.dtype!r}; it must be 'float32' or 'bfloat16'")
