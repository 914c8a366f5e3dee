"""EfficientAD by others' packages; see bench.predictor.peers."""

from __future__ import annotations

import importlib
from pathlib import Path

import torch
from torch import Tensor

from bench.predictor.peers_torch import BF16, FLOAT, HALF, Peer, Place, need_bfloat16, need_package
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
    session = library.InferenceSession(
        exported(detector, place.folder), options, providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        score, maps = session.run(["score", "anomaly_map"], {"image": images.numpy()})
        return torch.from_numpy(score), torch.from_numpy(maps)

    return Peer(Tensor.contiguous, run, FLOAT)


def openvino(detector: EfficientAD, place: Place, dtype: torch.dtype = FLOAT) -> Peer:
    need_package("openvino")
    if dtype == BF16:
        need_bfloat16()
    import openvino as library

    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": {FLOAT: "f32", BF16: "bf16"}[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    core = library.Core()
    model = core.read_model(exported(detector, place.folder))
    model.reshape([place.batch, 3, *detector.image_size])
    request = core.compile_model(model, "CPU", settings).create_infer_request()

    def run(images: Tensor) -> tuple[Tensor, Tensor]:
        found = request.infer({"image": images.numpy()})
        score, maps = (torch.from_numpy(found[name].copy()) for name in ("score", "anomaly_map"))
        return score, maps

    return Peer(Tensor.contiguous, run, dtype)


def exported(detector: EfficientAD, folder: Path) -> str:
    """Our ONNX file of the detector, run and compared when it is made; it is made once."""
    height, width = detector.image_size
    path = folder / f"{detector.size}-{height}x{width}.onnx"
    if not path.exists():
        export(detector, path)
    return str(path)
