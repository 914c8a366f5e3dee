"""PDN-S, PDN-M, the autoencoder and their size algebra.

Source: arXiv 2303.14535, Tables 6 (PDN-S), 7 (PDN-M) and 8 (autoencoder). Parameter names are the
layer names of the tables, so that a state dict reads like the paper.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efficientad.ops.dropout import dropout

TEACHER_CHANNELS = 384
STUDENT_CHANNELS = 2 * TEACHER_CHANNELS
MIN_IMAGE_SIZE = 256
SIZES = ("S", "M")


class Conv(NamedTuple):
    """One row of the PDN tables: a stride-1 convolution, then ReLU, then 2x2 average pooling."""

    kernel: int
    out_channels: int | None  # None: the width of the network's output
    padding: int  # of the padded variant; the unpadded one has 0 everywhere
    relu: bool
    pool: bool  # pooling has padding 1 in the padded variant, 0 in the unpadded one


PDN_LAYERS: dict[str, tuple[Conv, ...]] = {
    "S": (
        Conv(4, 128, 3, relu=True, pool=True),
        Conv(4, 256, 3, relu=True, pool=True),
        Conv(3, 256, 1, relu=True, pool=False),
        Conv(4, None, 0, relu=False, pool=False),
    ),
    "M": (
        Conv(4, 256, 3, relu=True, pool=True),
        Conv(4, 512, 3, relu=True, pool=True),
        Conv(1, 512, 0, relu=True, pool=False),
        Conv(3, 512, 1, relu=True, pool=False),
        Conv(4, None, 0, relu=True, pool=False),
        Conv(1, None, 0, relu=False, pool=False),
    ),
}


def check_model_size(size: str) -> str:
    """Return `size` if it names a PDN ("S" or "M"); otherwise raise ValueError."""
    if size not in SIZES:
        raise ValueError(f"size is {size!r}; it must be 'S' (small PDN) or 'M' (medium PDN)")
    return size


def check_image_size(height: int, width: int) -> None:
    """Raise ValueError unless height and width (pixels) are at least 256."""
    if height < MIN_IMAGE_SIZE or width < MIN_IMAGE_SIZE:
        raise ValueError(
            f"image size is {height}x{width}; height and width must be at least {MIN_IMAGE_SIZE}, "
            "because the autoencoder halves the image five times and its bottleneck then needs "
            "8x8 cells (Table 8). Resize the image to 256 or more"
        )


def check_pair(image_size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) as integers; ValueError unless they are two, each at least 256."""
    try:
        height, width = (operator.index(v) for v in image_size)
    except (TypeError, ValueError):
        raise ValueError(
            f"image_size is {image_size!r}; it must be (height, width), two integers"
        ) from None
    check_image_size(height, width)
    return height, width


def feature_size(length: int, padding: bool = False) -> int:
    """Cells along one axis of the PDN's output for `length` pixels: ceil(length / 4) [- 8]."""
    cells = -(-length // 4)
    return cells if padding else cells - 8


def decoder_sizes(length: int, padding: bool = False) -> tuple[int, ...]:
    """The decoder's seven resize targets along one axis: 3, 8, 15, 32, 63, 127, 56 at 256."""
    n = length
    return (
        n // 64 - 1,
        n // 32,
        n // 16 - 1,
        n // 8,
        n // 4 - 1,
        n // 2 - 1,
        feature_size(n, padding),
    )


class PDN(nn.Module):
    """Patch description network, Tables 6 and 7.

    Args:
        size: "S" or "M".
        out_channels: 384 for the teacher, 768 for the student.
        padding: True for the padded variant (256 -> 64 cells), False for the one without padding
            (256 -> 56 cells), which is the deployed one (paper, Appendix E). Same parameters.
    """

    conv1: nn.Conv2d  # and so on, named as in published files; see `layers`

    def __init__(
        self, size: str = "S", out_channels: int = TEACHER_CHANNELS, padding: bool = False
    ):
        super().__init__()
        self.size = check_model_size(size)
        self.padding = bool(padding)
        in_channels = 3
        for i, layer in enumerate(PDN_LAYERS[size], start=1):
            width = layer.out_channels or out_channels
            conv = nn.Conv2d(
                in_channels, width, layer.kernel, padding=layer.padding if padding else 0
            )
            setattr(self, f"conv{i}", conv)
            in_channels = width

    def layers(self) -> list[tuple[nn.Conv2d, Conv]]:
        """(convolution, row of the table) of every layer, from first to last."""
        rows = enumerate(PDN_LAYERS[self.size], start=1)
        return [(getattr(self, f"conv{i}"), row) for i, row in rows]

    @property
    def last(self) -> nn.Conv2d:
        """The last convolution, whose output channels are the network's."""
        return self.layers()[-1][0]

    def forward(self, x: Tensor) -> Tensor:
        """Normalised image (N, 3, H, W) -> features (N, out_channels, h, w); see `feature_size`."""
        for conv, row in self.layers():
            x = conv(x)
            if row.relu:
                x = F.relu(x)
            if row.pool:
                x = F.avg_pool2d(x, 2, 2, padding=int(self.padding))
        return x


@torch.no_grad()
def same_inner_layers(a: PDN, b: PDN) -> bool:
    """Whether two PDNs have the same weights, bit for bit, in every layer but the last.

    They then compute the same features up to there, once for both.
    """
    if (a.size, a.padding) != (b.size, b.padding):
        return False
    pairs = zip(a.layers()[:-1], b.layers()[:-1], strict=True)
    return all(
        torch.equal(mine, theirs)
        for (first, _), (second, _) in pairs
        for mine, theirs in zip(first.parameters(), second.parameters(), strict=True)
    )


class Encoder(nn.Module):
    """Encoder, Table 8: five 4x4 convolutions of stride 2, then 8x8 without ReLU."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 32, 64, 64, 64)
        for i in range(5):
            conv = nn.Conv2d(widths[i], widths[i + 1], 4, stride=2, padding=1)
            setattr(self, f"enconv{i + 1}", conv)
        self.enconv6 = nn.Conv2d(64, 64, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, 64, H // 32 - 7, W // 32 - 7); 1x1 at 256."""
        for i in range(1, 6):
            x = F.relu(getattr(self, f"enconv{i}")(x))
        return self.enconv6(x)


class Decoder(nn.Module):
    """Decoder, Table 8: bilinear resize and convolution, seven times; then 3x3."""

    def __init__(self, padding: bool = False, dropout: float = 0.2) -> None:
        super().__init__()
        self.padding = bool(padding)
        self.dropout = dropout
        for i in range(1, 7):
            setattr(self, f"deconv{i}", nn.Conv2d(64, 64, 4, padding=2))
        self.deconv7 = nn.Conv2d(64, 64, 3, padding=1)
        self.deconv8 = nn.Conv2d(64, TEACHER_CHANNELS, 3, padding=1)

    def forward(self, x: Tensor, image_size: tuple[int, int]) -> Tensor:
        """Bottleneck (N, 64, h, w) -> (N, 384, H', W') on the PDN's grid of `image_size` pixels."""
        return self.deconv8(self.inner(x, image_size))

    def inner(self, x: Tensor, image_size: tuple[int, int]) -> Tensor:
        """All layers but the last: bottleneck (N, 64, h, w) -> (N, 64, H', W')."""
        rows = decoder_sizes(image_size[0], self.padding)
        cols = decoder_sizes(image_size[1], self.padding)
        for i in range(1, 8):
            x = F.interpolate(x, size=(rows[i - 1], cols[i - 1]), mode="bilinear")
            x = F.relu(getattr(self, f"deconv{i}")(x))
            if i < 7:
                x = dropout(x, self.dropout, self.training)
        return x


class Autoencoder(nn.Module):
    """The autoencoder of Table 8, for any height and width of at least 256.

    Sizes other than 256 follow anomalib's generalisation of the resize targets, which matches the
    PDN's output for every size. From 288 pixels on the bottleneck is larger than 1x1.
    """

    def __init__(self, padding: bool = False) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.decoder = Decoder(padding)

    def forward(self, x: Tensor) -> Tensor:
        """Normalised image (N, 3, H, W) -> (N, 384, h, w), the grid of the PDN.

        Raises:
            ValueError: height or width below 256.
        """
        height, width = x.shape[-2:]
        check_image_size(height, width)
        return self.decoder(self.encoder(x), (height, width))
