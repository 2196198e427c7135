"""Small work on the host, by one thread a piece.

Matrices of 64 × 64 and rows of some thousand numbers are done before a second thread has woken up; and where other
processes are busy on the same cores, waiting for all threads takes a thousand times longer than the work.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_thread() -> Iterator[None]:
    """torch's own products and decompositions on the host take one thread meanwhile.

    The number is the process's: not for several threads at once.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(work: Callable[[T], R], pieces: Iterable[T]) -> list[R]:
    """The work on each piece, in order; as many pieces at a time as torch has threads, which take one each."""
    threads = torch.get_num_threads()
    with one_thread(), ThreadPoolExecutor(threads) as pool:
        return list(pool.map(work, pieces))
