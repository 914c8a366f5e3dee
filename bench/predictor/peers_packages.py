"""EfficientAD by others' packages; see bench.predictor.peers."""

from __future__ import annotations

import importlib
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.predictor.peers_torch import (
    BF16,
    FLOAT,
    HALF,
    NotHere,
    Peer,
    Place,
    need_bfloat16,
    need_package,
)
from efficientad.benchmark.contenders import as_images
from efficientad.checkpoint.exporting import export
from efficientad.model.detector import EfficientAD
from efficientad.model.networks import TEACHER_CHANNELS


def anomalib(detector: EfficientAD, place: Place) -> Peer:
    """anomalib's module with our weights; its own forward pass, normalisation included."""
    need_package("anomalib")
    theirs = importlib.import_module("anomalib.models.image.efficient_ad.torch_model")
    model = theirs.EfficientAdModel(
        teacher_out_channels=TEACHER_CHANNELS,
        model_size=getattr(theirs.EfficientAdModelSize, detector.size),
        padding=detector.padding,
        pad_maps=True,
    )
    state = {
        name.replace("autoencoder.", "ae."): value
        for name, value in detector.state_dict().items()
        if name.startswith(("teacher.", "student.", "autoencoder."))
    }
    state |= {"mean_std.mean": detector.teacher_mean, "mean_std.std": detector.teacher_std}
    for name, value in zip(("qa_st", "qb_st", "qa_ae", "qb_ae"), detector.quantiles, strict=True):
        state[f"quantiles.{name}"] = value
    model.load_state_dict(state)
    model.eval().to(place.device)
    on_cuda = place.device.type == "cuda"

    @torch.no_grad()
    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cuda", HALF, enabled=on_cuda):
            out = model(images.to(place.device, non_blocking=True))
        return out.pred_score.flatten().cpu(), out.anomaly_map.squeeze(1).cpu()

    prepare = Tensor.pin_memory if on_cuda else Tensor.contiguous
    return Peer(prepare, run, place.dtype, border="anomalib")


def onnxruntime(detector: EfficientAD, place: Place) -> Peer:
    need_package("onnxruntime")
    import onnxruntime as library

    options = library.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    if place.parked:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = library.InferenceSession(
        exported(detector, place), options, providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        score, maps = session.run(["score", "anomaly_map"], {"image": images.numpy()})
        return torch.from_numpy(score), torch.from_numpy(maps)

    return Peer(Tensor.contiguous, run, FLOAT)


def openvino(detector: EfficientAD, place: Place, dtype: torch.dtype = FLOAT) -> Peer:
    need_package("openvino")
    if dtype == BF16:
        need_bfloat16()
    return _compiled(exported(detector, place), detector, place, dtype)


def openvino_int8(detector: EfficientAD, place: Place) -> Peer:
    """NNCF's post-training quantisation; what stays in floats is computed in float32."""
    return _compiled(quantised(detector, place), detector, place, torch.int8)


def _compiled(path: str, detector: EfficientAD, place: Place, dtype: torch.dtype) -> Peer:
    """OpenVINO on a model file, for this batch alone."""
    import openvino as library

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == BF16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = library.Core()
    model = core.read_model(path)
    model.reshape([place.batch, 3, *detector.image_size])
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        found = request.infer({"image": images.numpy()})
        score, maps = (torch.from_numpy(found[name].copy()) for name in ("score", "anomaly_map"))
        return score, maps

    return Peer(Tensor.contiguous, run, dtype)


def exported(detector: EfficientAD, place: Place) -> str:
    """Our ONNX file of the detector, run and compared when it is made; it is made once."""
    path = _kept(detector, place, ".onnx")
    if not path.exists():
        export(detector, path)
    return str(path)


def quantised(detector: EfficientAD, place: Place) -> str:
    """Our ONNX file with int8 networks, calibrated on the place's good pictures; made once.

    What is behind the last convolutions stays in floats: a map is a small difference of large
    numbers, which eight bits would lose.
    """
    need_package("openvino")
    need_package("nncf")
    if place.good is None:
        raise NotHere("no good pictures to calibrate it on")
    path = _kept(detector, place, "-int8.xml")
    if not path.exists():
        import nncf
        import openvino as library

        logging.getLogger("nncf").setLevel(logging.ERROR)  # a line for each operation
        model = library.Core().read_model(exported(detector, place))
        pictures = nncf.Dataset(list(as_images(place.good)), lambda image: image[None].numpy())
        small = nncf.quantize(
            model,
            pictures,
            subset_size=len(place.good),
            ignored_scope=nncf.IgnoredScope(names=_behind_convolutions(model), validate=False),
        )
        with tempfile.TemporaryDirectory(dir=place.folder) as folder:
            library.save_model(small, Path(folder) / path.name, compress_to_fp16=False)
            for suffix in (".bin", ".xml"):  # the second one is asked for
                (Path(folder) / path.name).with_suffix(suffix).replace(path.with_suffix(suffix))
    return str(path)


def _behind_convolutions(model: Any) -> list[str]:
    """Names of an OpenVINO model's operations that no convolution depends on."""
    read: set[str] = set()
    behind = []
    for node in reversed(model.get_ordered_ops()):
        name = node.get_friendly_name()
        if name in read or node.get_type_name() == "Convolution":
            sources = (value.get_source_output().get_node() for value in node.inputs())
            read.update(source.get_friendly_name() for source in sources)
        else:
            behind.append(name)
    return behind


def _kept(detector: EfficientAD, place: Place, suffix: str) -> Path:
    height, width = detector.image_size
    return place.folder / f"{detector.size}-{height}x{width}{suffix}"
