"""An image batch -> normalised RGBX, the input of every network.

The arithmetic is the definition's, in its order and in float32 with divisions rounded to nearest,
so the result is equal to `efficientad.ops.reference.pack` bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .common import target_of
from .grouped import architecture, check_rows
from .launching import launch

BLOCK = 256  # pixels a program; bound by memory on every architecture, so one choice serves all
WARPS = 4


# Sizes are not specialised: one binary serves every image, and it is the one that the census shows.
@triton.jit(
    do_not_specialize=[
        "stride_n", "stride_y", "stride_x", "stride_c", "height", "width", "border", "n_pixels",
    ]
)  # fmt: skip
def _pack_kernel(
    image_ptr, stride_n: tl.int64, stride_y: tl.int64, stride_x: tl.int64, stride_c: tl.int64,
    mean_ptr,  # (3,) float32
    std_ptr,  # (3,) float32
    out_ptr,  # (N, height + 2 border, width + 2 border, 4)
    height, width,
    border,
    n_pixels,  # N * (height + 2 border) * (width + 2 border)
    SCALE: tl.constexpr,  # whether values are 0..255
    BLOCK: tl.constexpr,
):  # fmt: skip
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    out_width = width + 2 * border
    out_height = height + 2 * border
    x = pixel % out_width - border
    y = (pixel // out_width) % out_height - border
    n = pixel // (out_width * out_height)
    c = tl.arange(0, 4)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height) & (pixel < n_pixels)
    some = inside[:, None] & (c < 3)[None, :]  # [BLOCK, 4]

    start = n.to(tl.int64) * stride_n + y.to(tl.int64) * stride_y + x.to(tl.int64) * stride_x
    offset = start[:, None] + (c.to(tl.int64) * stride_c)[None, :]
    value = tl.load(image_ptr + offset, mask=some, other=0).to(tl.float32)
    if SCALE:
        value = tl.div_rn(value, tl.full((BLOCK, 4), 255.0, tl.float32))
    mean = tl.load(mean_ptr + c, mask=c < 3, other=0.0)
    std = tl.load(std_ptr + c, mask=c < 3, other=1.0)
    value = tl.div_rn(value - mean[None, :], tl.broadcast_to(std[None, :], (BLOCK, 4)))
    value = tl.where(some, value, 0.0)
    tl.store(
        out_ptr + pixel.to(tl.int64)[:, None] * 4 + c[None, :],
        value.to(out_ptr.dtype.element_ty),
        mask=(pixel < n_pixels)[:, None],
    )


def _launch(image, mean, std, out, channels_last: bool, border: int, size: tuple[int, int]) -> None:
    """Reads `size` rows and columns of each image; the caller vouches for every extent."""
    n = len(image)
    pixels = n * (size[0] + 2 * border) * (size[1] + 2 * border)
    check_rows(pixels)
    if pixels == 0:
        return
    dims = (0, 1, 2, 3) if channels_last else (0, 2, 3, 1)
    launch(
        _pack_kernel, triton.cdiv(pixels, BLOCK),
        image, *[image.stride(dim) for dim in dims],
        mean,
        std,
        out,
        *size, border, pixels,
        SCALE=image.dtype.itemsize == 1,
        BLOCK=BLOCK,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )  # fmt: skip


def pack(
    image,
    mean,
    std,
    *,
    channels_last: bool,
    border: int = 0,
    dtype=None,
    out=None,
    target: int | None = None,
):
    """Normalise an image batch and pack it as RGBX, the input of every network.

    Args:
        image: (N, H, W, 3) if `channels_last`, else (N, 3, H, W), with any strides; uint8 in 0..255
            or float16 or float32 in 0..1.
        mean, std: (3,) float32, of the image scaled to 0..1.
        border: rows and columns of exact zeros put on every side (the padded PDN's first padding).
        dtype: float16 or bfloat16, of the result; None is `out`'s, else float16.
        out: where the result goes; None allocates it.
        target: compute capability; None is the device's. All run the same code.

    Returns:
        (N, H + 2 border, W + 2 border, 4); the fourth channel is 0.
    """
    architecture(target_of(image) if target is None else target)
    height, width = image.shape[1:3] if channels_last else image.shape[2:4]
    if out is None:
        if dtype is None:
            import torch  # the launcher's tensors bring it; nothing else here needs it

            dtype = torch.float16
        shape = (len(image), height + 2 * border, width + 2 * border, 4)
        out = image.new_empty(shape, dtype=dtype)
    _launch(image, mean, std, out, channels_last, border, (height, width))
    return out
