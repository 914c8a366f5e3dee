"""Memory that was freed and that the C library still holds."""

from __future__ import annotations

import ctypes


def give_back_freed() -> None:
    """Let the system have what is freed; does nothing where the C library is not glibc.

    Else a picture that a thread has decoded stays resident beside what is made of it: glibc keeps
    freed blocks of up to 32 MB for the thread that allocated them.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return
    trim(0)
