"""EfficientAD anomaly detection (arXiv 2303.14535): the public API, imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "AnomalyOutput": "model.output",
    "CheckpointError": "checkpoint.safe_pickle",
    "EfficientAD": "model.detector",
    "FastPredictor": "fast.predictor",
    "Fp8Error": "fast.fp8",
    "UncalibratedError": "model.detector",
    "accelerate": "adapters.anomalib",
    "calibrate": "calibration.calibrating",
    "convert": "checkpoint.loading",
    "evaluate": "evaluation.evaluation",
    "export": "checkpoint.exporting",
    "fit": "training.fitting",
    "load": "checkpoint.loading",
    "load_teacher": "checkpoint.loading",
    "Prediction": "results.prediction",
    "predict": "results.plain_path",
    "save": "checkpoint.native_file",
}

__all__ = sorted([*_EXPORTS, "__version__"])

if TYPE_CHECKING:
    from efficientad.adapters.anomalib import accelerate
    from efficientad.calibration.calibrating import calibrate
    from efficientad.checkpoint.exporting import export
    from efficientad.checkpoint.loading import convert, load, load_teacher
    from efficientad.checkpoint.native_file import save
    from efficientad.checkpoint.safe_pickle import CheckpointError
    from efficientad.evaluation.evaluation import evaluate
    from efficientad.fast.fp8 import Fp8Error
    from efficientad.fast.predictor import FastPredictor
    from efficientad.model.detector import EfficientAD, UncalibratedError
    from efficientad.model.output import AnomalyOutput
    from efficientad.results.plain_path import predict
    from efficientad.results.prediction import Prediction
    from efficientad.training.fitting import fit


def __getattr__(name: str) -> Any:
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
