"""bfloat16 and float8_e4m3fn, which numpy lacks; rounded to nearest even, NaN kept."""

from __future__ import annotations

import numpy as np

E4M3_MAX = 448.0


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bf16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1)).astype(np.uint32)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def _e4m3_table() -> np.ndarray:
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    value = np.where(
        exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10), mantissa * 2.0**-9
    )  # fmt: skip
    value = np.where((byte & 127) == 127, np.nan, value)
    return np.where(byte < 128, value, -value).astype(np.float32)


E4M3 = _e4m3_table()
_POSITIVE = E4M3[:127].astype(np.float64)  # ascending


def from_e4m3(byte: np.ndarray) -> np.ndarray:
    return E4M3[byte]


def to_e4m3(x: np.ndarray) -> np.ndarray:
    """Saturated to +-448, as `satfinite` does; NaN is 0x7f."""
    size = np.abs(x).astype(np.float64)
    low = np.clip(np.searchsorted(_POSITIVE, size, side="right") - 1, 0, 126)
    high = np.minimum(low + 1, 126)
    below, above = size - _POSITIVE[low], _POSITIVE[high] - size
    up = (above < below) | ((above == below) & (low % 2 == 1))
    code = np.where(up, high, low) | (np.signbit(x) << 7)
    return np.where(np.isnan(x), 0x7F, code).astype(np.uint8)
