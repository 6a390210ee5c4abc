"""The C library's allocator on the CPU: memory that a tensor frees stays with the process for the next one."""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
LARGEST = 2**30  # bytes of a block that is reused; larger ones come from the system and go back to it
MOST_UNUSED = 2**31 - 1  # bytes at the end of the heap that do not go back to the system
OWN_SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Let glibc reuse the memory of freed tensors, instead of new pages for each; return whether it does now.

    By default each large tensor is mapped anew, and the system clears its pages: a twentieth of a CPU run. Results are
    the same bits. Settings in the environment stay as they are, and so does another C library.
    """
    if any(name in os.environ for name in OWN_SETTINGS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  (only glibc has it, and the numbers above are glibc's)
        mallopt = library.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # One without the other would be worse than neither: any of them ends glibc's own adjustment of the threshold.
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, MOST_UNUSED))
