"""What the C library's allocator (glibc) does with large blocks; where it is another one, nothing is changed."""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt, malloc.h
LARGE = 7 * 2**20  # bytes: more than a picture of 1080p in RGB, less than a plane of an 8K one's colours
KEPT = 2**25  # bytes free at the end of the heap that are kept for what comes


def large_blocks_apart() -> None:
    """From now on blocks from LARGE on are taken from the system and go back when they are freed.

    As it comes glibc takes blocks of up to 32 MiB from its heap once one was freed. Planes of 8K pictures and float
    copies of their parts are just below that and of ever other sizes: they tore the heap, 2 GB for what takes 0.6.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, KEPT)  # as large as glibc's own rule would make it: not a call for each picture


def give_back_memory() -> None:
    """Hand memory that was freed back to the system.

    A decoder's pictures come from malloc, which keeps what is freed between pieces still in use: after 8K with 16
    reference pictures 1 GB, beside what the next decoder takes.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
