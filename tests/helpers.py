"""What several test files build: images with structure, detectors calibrated on their own maps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from efficientad import EfficientAD
from efficientad.networks import PDN_LAYERS, decoder_sizes
from efficientad.reference import resize_reads


def images(n: int, height: int = 256, width: int = 256, seed: int = 0) -> Tensor:
    """(n, 3, height, width) in 0..1: smooth random fields with some noise, different per image."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 9, 11, generator=generator)
    smooth = F.interpolate(coarse, size=(height, width), mode="bicubic")
    noise = torch.rand(n, 3, height, width, generator=generator)
    return (0.85 * smooth + 0.15 * noise).clamp(0, 1)


@torch.no_grad()
def detector(size: str = "S", seed: int = 0, calibrated: bool = True, **options) -> EfficientAD:
    """Random weights with outputs of a trained detector's size; calibrated on `images(2)`."""
    torch.manual_seed(seed)
    model = EfficientAD(size, **options)
    x = model.normalize(images(1, *model.image_size, seed=seed + 99))
    last = getattr(model.student, "conv4" if size == "S" else "conv6")
    for net, conv in (
        (model.student, last),
        (model.autoencoder, model.autoencoder.decoder.deconv8),
    ):
        out = net(x)
        mean = out.mean(dim=(0, 2, 3))
        factor = 0.3 / (out - mean[:, None, None]).std()
        conv.weight.data *= factor
        conv.bias.data = (conv.bias.data - mean) * factor
    if calibrated:
        calibrate_on_own_maps(model, images(2, *model.image_size, seed=seed + 100))
    return model


@torch.no_grad()
def calibrate_on_own_maps(model: EfficientAD, image: Tensor) -> None:
    features = model.teacher(model.normalize(image)).double()
    mean = features.mean(dim=(0, 2, 3))
    std = features.std(dim=(0, 2, 3), correction=0)
    model.set_statistics(mean, std)
    maps = model.distance_maps(image)
    levels = torch.tensor([0.9, 0.995])
    model.set_quantiles(*[q for m in maps for q in torch.quantile(m.float(), levels).tolist()])


@torch.no_grad()
def compose(
    model: EfficientAD, image: Tensor, operations, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The forward pass of `model` out of fused operations, as the fast path strings them.

    operations: `efficientad.reference`, or anything with its functions. dtype: of activations and
    filters; None is the image's. Biases and statistics stay in at least float32.
    """
    dtype = dtype or image.dtype
    wide = torch.promote_types(dtype, torch.float32)

    def ohwi(weight: Tensor, channels: int = 0) -> Tensor:
        weight = weight.permute(0, 2, 3, 1)
        return F.pad(weight, (0, max(channels - weight.shape[3], 0))).to(dtype).contiguous()

    def grouped(tensors: list[Tensor]) -> list[Tensor]:  # consecutive views of one buffer
        return list(torch.cat(tensors).split([len(t) for t in tensors]))

    def layer(i: int, factor: float = 1.0, channels: int = 0):
        convs = [getattr(net, f"conv{i}") for net in (model.teacher, model.student)]
        weights = grouped([ohwi(c.weight * factor, channels) for c in convs])
        return weights, grouped([c.bias.to(wide) * factor for c in convs])

    layers = PDN_LAYERS[model.size]
    mean, std = (v.flatten().to(wide) for v in (model.image_mean, model.image_std))
    border = layers[0].padding if model.padding else 0
    pool_padding = int(model.padding)
    packed = operations.pack(image, mean, std, channels_last=False, border=border, dtype=dtype)
    x = operations.first_conv_relu_pool(packed, *layer(1, channels=4), pool_padding=pool_padding)
    for i, row in list(enumerate(layers, start=1))[1:-1]:
        padding = row.padding if model.padding else 0
        if row.pool:  # the pool's quarter is in the weights
            options = {"padding": padding, "pool_padding": pool_padding, "pool_scale": 1.0}
            x = operations.conv_relu_pool(x, *layer(i, 0.25), **options)
        else:
            x = operations.conv_relu(x, *layer(i), padding=padding)

    encoder, decoder = model.autoencoder.encoder, model.autoencoder.decoder
    y = packed[:, border : packed.shape[1] - border, border : packed.shape[2] - border]
    for i in range(1, 6):
        conv = getattr(encoder, f"enconv{i}")
        weight = ohwi(conv.weight, 4)
        y = operations.strided_conv_relu(y, weight, conv.bias.to(wide))
    rows = decoder_sizes(image.shape[2], model.padding)
    cols = decoder_sizes(image.shape[3], model.padding)
    sides = [(ohwi(c.weight), c.bias.to(wide)) for c in (encoder.enconv6, decoder.deconv1)]
    if y.shape[1:3] == (8, 8):
        y = operations.bottleneck(y, *sides[0], *sides[1])
    else:
        y = operations.strided_conv_relu(y, *sides[0], stride=1, padding=0, relu=False)
        y = operations.resize_conv_relu(y, *sides[1], (rows[0], cols[0]))
    for i in range(2, 8):
        conv = getattr(decoder, f"deconv{i}")
        needed = {}
        if i == 6:  # only what the last resize reads
            for name, sizes in (("rows", rows), ("cols", cols)):
                reads = resize_reads(sizes[5] + 1, sizes[6])
                needed[name] = torch.tensor(reads, dtype=torch.int32, device=image.device)
        size = (rows[i - 1], cols[i - 1])
        padding = 2 if i < 7 else 1
        weight = ohwi(conv.weight)
        y = operations.resize_conv_relu(
            y, weight, conv.bias.to(wide), size, padding=padding, **needed
        )

    teacher_std = model.teacher_std.flatten()
    last_t, last_s = (getattr(n, f"conv{len(layers)}") for n in (model.teacher, model.student))
    deconv8 = decoder.deconv8
    own_bias = torch.cat([(last_t.bias - model.teacher_mean.flatten()) / teacher_std, deconv8.bias])
    maps = operations.pair_distance(
        x[0],
        x[1],
        y,
        ohwi(last_t.weight / teacher_std[:, None, None, None]),
        ohwi(-last_s.weight),
        ohwi(deconv8.weight),
        (own_bias - last_s.bias).to(wide),
    )
    size = tuple(image.shape[-2:])
    return operations.anomaly_map(*maps, model.affine.to(wide), size, padding=model.map_padding)
