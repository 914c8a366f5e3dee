"""Makes files that look like anomalib's, nelson1425's and rximg's, by torch.save of fake classes.

The fake classes carry the real modules' names while a file is written and are gone afterwards, so a
reader that imports or calls anything a file names fails. The networks here are written from the
paper's tables, apart from the package, and give the numbers to compare with.
"""

from __future__ import annotations

import enum
import sys
import types
from collections import OrderedDict
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)


class EfficientAdModelSize(str, enum.Enum):
    M = "medium"
    S = "small"


class TaskType(str, enum.Enum):
    SEGMENTATION = "segmentation"


class PatchNetwork(nn.Module):
    def __init__(self, out_channels: int, padding: bool, medium: bool = False):
        super().__init__()
        p = 1 if padding else 0
        if medium:
            self.conv1, self.conv2 = (
                nn.Conv2d(3, 256, 4, 1, 3 * p),
                nn.Conv2d(256, 512, 4, 1, 3 * p),
            )
            self.conv3, self.conv4 = nn.Conv2d(512, 512, 1), nn.Conv2d(512, 512, 3, 1, p)
            self.conv5 = nn.Conv2d(512, out_channels, 4)
            self.conv6 = nn.Conv2d(out_channels, out_channels, 1)
        else:
            self.conv1, self.conv2 = (
                nn.Conv2d(3, 128, 4, 1, 3 * p),
                nn.Conv2d(128, 256, 4, 1, 3 * p),
            )
            self.conv3, self.conv4 = nn.Conv2d(256, 256, 3, 1, p), nn.Conv2d(256, out_channels, 4)
        self.avgpool1 = nn.AvgPool2d(2, 2, padding=p)
        self.avgpool2 = nn.AvgPool2d(2, 2, padding=p)

    def forward(self, x: Tensor) -> Tensor:
        x = self.avgpool1(F.relu(self.conv1(x)))
        x = self.avgpool2(F.relu(self.conv2(x)))
        x = F.relu(self.conv3(x))
        if hasattr(self, "conv5"):
            return self.conv6(F.relu(self.conv5(F.relu(self.conv4(x)))))
        return self.conv4(x)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        for i, (a, b) in enumerate(((3, 32), (32, 32), (32, 64), (64, 64), (64, 64)), start=1):
            setattr(self, f"enconv{i}", nn.Conv2d(a, b, 4, 2, 1))
        self.enconv6 = nn.Conv2d(64, 64, 8)


class Decoder(nn.Module):
    def __init__(self, padding: bool):
        super().__init__()
        self.padding = padding
        for i in range(1, 7):
            setattr(self, f"deconv{i}", nn.Conv2d(64, 64, 4, 1, 2))
            setattr(self, f"dropout{i}", nn.Dropout(0.2))
        self.deconv7, self.deconv8 = nn.Conv2d(64, 64, 3, 1, 1), nn.Conv2d(64, 384, 3, 1, 1)


class AutoEncoder(nn.Module):
    def __init__(self, padding: bool):
        super().__init__()
        self.encoder, self.decoder = Encoder(), Decoder(padding)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 6):
            x = F.relu(getattr(self.encoder, f"enconv{i}")(x))
        x = self.encoder.enconv6(x)
        for i, n in enumerate((3, 8, 15, 32, 63, 127), start=1):
            x = F.relu(
                getattr(self.decoder, f"deconv{i}")(F.interpolate(x, (n, n), mode="bilinear"))
            )
        n = 64 if self.decoder.padding else 56
        return self.decoder.deconv8(
            F.relu(self.decoder.deconv7(F.interpolate(x, (n, n), mode="bilinear")))
        )


class EfficientAdModel(nn.Module):
    """anomalib's model; `raw_maps` is the part of its forward before padding and quantiles."""

    def __init__(self, medium: bool = False, padding: bool = False, pad_maps: bool = True):
        super().__init__()
        self.pad_maps = pad_maps
        self.teacher = PatchNetwork(384, padding, medium)
        self.student = PatchNetwork(768, padding, medium)
        self.ae = AutoEncoder(padding)
        self.teacher_out_channels = 384
        zeros = {name: torch.zeros(1, 384, 1, 1) for name in ("mean", "std")}
        self.mean_std = nn.ParameterDict(zeros)
        names = ("qa_st", "qb_st", "qa_ae", "qb_ae")
        self.quantiles = nn.ParameterDict({name: torch.tensor(0.0) for name in names})

    @torch.no_grad()
    def raw_maps(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = (image - MEAN) / STD
        teacher = self.teacher(x)
        if self.mean_std["std"].any():
            teacher = (teacher - self.mean_std["mean"]) / self.mean_std["std"]
        student = self.student(x)
        return (
            (teacher - student[:, :384]).square().mean(1),
            (self.ae(x) - student[:, 384:]).square().mean(1),
        )

    @torch.no_grad()
    def set_calibration(self) -> EfficientAdModel:
        self.mean_std.update(
            {"mean": torch.rand(1, 384, 1, 1) - 0.5, "std": torch.rand(1, 384, 1, 1) + 0.5}
        )
        values = {"qa_st": 0.25, "qb_st": 0.75, "qa_ae": 0.5, "qb_ae": 1.25}
        self.quantiles.update({name: torch.tensor(value) for name, value in values.items()})
        return self


def anomalib_model(seed: int = 0, calibrated: bool = True, **options) -> EfficientAdModel:
    """Random weights with maps of order 1."""
    torch.manual_seed(seed)
    model = EfficientAdModel(**options).eval()
    with torch.no_grad():
        for net in (model.teacher, model.student):
            list(net.children())[-3].weight.mul_(20)
        model.ae.decoder.deconv8.weight.mul_(20)
    return model.set_calibration() if calibrated else model


class Compose(nn.Module):
    def __init__(self, transforms: list):
        super().__init__()
        self.transforms = transforms


class Resize(nn.Module):
    def __init__(self, size, antialias: bool = True):
        super().__init__()
        self.size, self.antialias = size, antialias


class Normalize(nn.Module):
    def __init__(self, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)):
        super().__init__()
        self.mean, self.std, self.inplace = list(mean), list(std), False


class CenterCrop(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size


class PreProcessor(nn.Module):
    def __init__(self, transform):
        super().__init__()
        self.transform = transform


class PostProcessor(nn.Module):
    def __init__(self, threshold: float):
        super().__init__()
        for name in ("_image_threshold", "_pixel_threshold", "image_min", "image_max"):
            self.register_buffer(name, torch.tensor(float("nan")))
        self._image_threshold.fill_(threshold)
        self.enable_thresholding = True


class InferenceModel(nn.Module):
    def __init__(self, model, transform):
        super().__init__()
        self.model, self.transform = model, transform


class EfficientAd(nn.Module):
    """anomalib's LightningModule, with an attribute of a kind that no reader knows."""

    def __init__(self, model, pre_processor, post_processor):
        super().__init__()
        self.model, self.pre_processor, self.post_processor = model, pre_processor, post_processor
        self.imagenet_dir = Path("datasets/imagenette")
        self.model_size = EfficientAdModelSize.S
        self._hparams = {"padding": False, "model_size": EfficientAdModelSize.S}


class Visualizer:
    def __init__(self):
        self.fields = {"image", "gt_mask"}


MODEL = "anomalib.models.image.efficient_ad"
FAKES = {
    f"{MODEL}.torch_model": (
        EfficientAdModelSize,
        PatchNetwork,
        Encoder,
        Decoder,
        AutoEncoder,
        EfficientAdModel,
    ),
    f"{MODEL}.lightning_model": (EfficientAd,),
    "anomalib.deploy.export": (InferenceModel,),
    "anomalib": (TaskType,),
    "anomalib.pre_processing.pre_processor": (PreProcessor,),
    "anomalib.post_processing.post_processor": (PostProcessor,),
    "anomalib.visualization.image.visualizer": (Visualizer,),
    "torchvision.transforms.v2._container": (Compose,),
    "torchvision.transforms.v2._geometry": (Resize, CenterCrop),
    "torchvision.transforms.v2._misc": (Normalize,),
}


@contextmanager
def fake_modules():
    """Let the fake classes be pickled under the real names, for the duration of a save."""
    modules, before = {}, {}
    for name, classes in FAKES.items():
        for i in range(1, name.count(".") + 2):
            parent = ".".join(name.split(".")[:i])
            modules.setdefault(parent, types.ModuleType(parent))
        for cls in classes:
            before[cls] = cls.__module__
            cls.__module__ = name
            setattr(modules[name], cls.__name__, cls)
    saved = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(saved)
        for cls, name in before.items():
            cls.__module__ = name


def torch_save(content: object, path: Path) -> Path:
    with fake_modules():
        torch.save(content, path)
    return path


def lightning_checkpoint(
    model: EfficientAdModel, version: int, threshold: float = 0.5, transform: object = None
) -> dict:
    """What Lightning writes: settings with an enum, a Path and objects; optimiser; callbacks."""
    state = OrderedDict()
    if version == 1:
        metric = "anomalib.metrics.threshold.f1_adaptive_threshold.F1AdaptiveThreshold"
        state["image_threshold_class"] = state["pixel_threshold_class"] = metric
        state["pred_scores_normalization_class"] = "anomalib.metrics.min_max.MinMax"
    state.update(nn.ModuleDict({"model": model}).state_dict())
    hyper = {
        "imagenet_dir": Path("datasets/imagenette"),
        "teacher_out_channels": 384,
        "model_size": EfficientAdModelSize.S,
        "lr": 1e-4,
        "padding": model.ae.decoder.padding,
        "pad_maps": model.pad_maps,
    }
    if version == 1:
        state["image_threshold.value"] = torch.tensor(threshold)
        state["pixel_threshold.value"] = torch.tensor(threshold)
        state["normalization_metrics.pred_scores.min"] = torch.tensor(0.1)
    else:
        processors = nn.ModuleDict({"post_processor": PostProcessor(threshold)})
        state.update(processors.state_dict())
        pre = True if transform is None else PreProcessor(transform)
        hyper |= {"pre_processor": pre, "post_processor": True, "visualizer": Visualizer()}
    parameter = nn.Parameter(torch.ones(7))
    optimizer = torch.optim.Adam([parameter], lr=1e-4, weight_decay=1e-5)
    parameter.sum().backward()
    optimizer.step()
    checkpoint = {
        "epoch": 9,
        "global_step": 70_000,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": state,
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"current": {"ready": 9}}}},
        "callbacks": {
            "ModelCheckpoint{'monitor': None}": {
                "best_model_score": None,
                "dirpath": "/results/EfficientAd/weights",
                "kth_value": torch.tensor(float("inf")),
            }
        },
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [torch.optim.lr_scheduler.StepLR(optimizer, 10).state_dict()],
        "hparams_name": "kwargs",
        "hyper_parameters": hyper,
    }
    if version == 1:
        checkpoint["transform"] = transform
    return checkpoint


def nelson_pdn(source: PatchNetwork, padding: bool = False) -> nn.Sequential:
    """nelson1425's nn.Sequential with the weights of `source`."""
    convs = [m for m in source.children() if isinstance(m, nn.Conv2d)]
    layers: list[nn.Module] = []
    for i, conv in enumerate(convs):
        new = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, padding=3 * padding)
        new.load_state_dict(conv.state_dict())
        layers.append(new)
        if i < len(convs) - 1:
            layers.append(nn.ReLU(inplace=True))
        if i < 2:
            layers.append(nn.AvgPool2d(2, 2))
    return nn.Sequential(*layers)


def nelson_autoencoder(source: AutoEncoder, dropout: bool, last: int = 56) -> nn.Sequential:
    """nelson1425's autoencoder with (today's) or without (the first one's) Dropout modules."""
    layers: list[nn.Module] = []
    for i in range(1, 7):
        layers += [getattr(source.encoder, f"enconv{i}"), nn.ReLU(inplace=True)]
    layers.pop()
    for i, size in enumerate((3, 8, 15, 32, 63, 127), start=1):
        layers += [nn.Upsample(size=size, mode="bilinear"), getattr(source.decoder, f"deconv{i}")]
        layers += [nn.ReLU(inplace=True)] + [nn.Dropout(0.2)] * dropout
    layers += [nn.Upsample(size=last, mode="bilinear"), source.decoder.deconv7]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), source.decoder.deconv8)


def nelson_folder(folder: Path, model: EfficientAdModel, dropout: bool = True) -> Path:
    folder.mkdir()
    torch.save(nelson_pdn(model.teacher), folder / "teacher_final.pth")
    torch.save(nelson_pdn(model.student), folder / "student_final.pth")
    torch.save(nelson_autoencoder(model.ae, dropout).eval(), folder / "autoencoder_final.pth")
    return folder


def rximg_folder(folder: Path, model: EfficientAdModel, category: str = "bottle") -> Path:
    folder.mkdir(exist_ok=True)
    for name, net in (("best_teacher", model.teacher), (f"{category}_student", model.student)):
        torch.save(nn.ModuleDict({"pdn": net}).state_dict(), folder / f"{name}.pth")
    torch.save(model.ae.state_dict(), folder / f"{category}_autoencoder.pth")
    values = {name: np.float64(value.item()) for name, value in model.quantiles.items()}
    values["qb_ae"] = np.float32(
        values["qb_ae"]
    )  # np.percentile of float32 gave either, by version
    values |= {name: value.detach().numpy() for name, value in model.mean_std.items()}
    np.save(folder / f"{category}_quantiles.npy", values)
    return folder
