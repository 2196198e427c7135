"""Small work on the host, by one thread.

Matrices of 64 × 64 and rows of some thousand numbers are done before a second thread has woken up; and where other
processes are busy on the same cores, waiting for all threads takes a thousand times longer than the work.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's own products and decompositions on the host take one thread meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
