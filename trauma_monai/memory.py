"""How a process handles the memory of its tensors on a CPU."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

KEPT_BYTES = 1 << 30
"""Blocks up to this size are reused, and so much free memory is kept at most."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of options in glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors.

    By default glibc gives large blocks back to the system at once and gets them anew, page by page, for the next layer
    of a network: up to 40 % of the time of a forward pass. The results do not depend on it.

    Returns:
        Whether the C library took it; other libraries than glibc are left as they are.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return all(mallopt(option, KEPT_BYTES) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))
