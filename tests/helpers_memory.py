"""Memory whose end nobody may cross."""

from __future__ import annotations

import ctypes
import mmap

import torch


def at_the_end_of_a_page(like: torch.Tensor) -> torch.Tensor:
    """A tensor of that shape, behind whose last value lies memory that nobody may touch."""
    size = -(-like.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    options = {"dtype": like.dtype, "count": like.numel(), "offset": size - like.nbytes}
    return torch.frombuffer(pages, **options).view(like.shape)
