"""EfficientAD anomaly detection (arXiv 2303.14535): the public API, imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_EXPORTS = {
    "AnomalyOutput": "detector",
    "CheckpointError": "safe_pickle",
    "EfficientAD": "detector",
    "FastPredictor": "predictor",
    "Fp8Error": "fp8",
    "UncalibratedError": "detector",
    "accelerate": "adapters",
    "calibrate": "calibration",
    "convert": "checkpoint",
    "evaluate": "evaluation",
    "export": "exporting",
    "fit": "training",
    "load": "checkpoint",
    "load_teacher": "checkpoint",
    "Prediction": "prediction",
    "predict": "prediction",
    "save": "checkpoint",
}

__all__ = sorted([*_EXPORTS, "__version__"])

if TYPE_CHECKING:
    from efficientad.adapters import accelerate
    from efficientad.calibration import calibrate
    from efficientad.checkpoint import CheckpointError, convert, load, load_teacher, save
    from efficientad.detector import AnomalyOutput, EfficientAD, UncalibratedError
    from efficientad.evaluation import evaluate
    from efficientad.exporting import export
    from efficientad.fp8 import Fp8Error
    from efficientad.prediction import Prediction, predict
    from efficientad.predictor import FastPredictor
    from efficientad.training import fit


def __getattr__(name: str):
    if name == "kernels":  # lives in kernels/ of the checkout and is mapped here by the install
        try:
            return importlib.import_module("efficientad.kernels")
        except ModuleNotFoundError as error:
            if error.name != "efficientad.kernels":
                raise
            raise ImportError(
                "efficientad.kernels is not installed; in the checkout run "
                "`pip install -c constraints.txt -e .`"
            ) from None
    if name not in _EXPORTS:
        raise AttributeError(f"module 'efficientad' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"efficientad.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
