"""What loader processes make, in order; an error of the user's arrives as itself.

torch would turn an exception that is raised in a loader process into one whose message is a traceback. So a
``UserError``, ``BadExample`` among them, travels as a value and is raised at home, at its place in the order. Any other
exception is a defect of ours and stays torch's: it arrives with its traceback.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

from vlbench.core.errors import UserError

K = TypeVar("K")
T = TypeVar("T")


def loaded(
    make: Callable[[K], T], keys: Iterable[K], *, workers: int, ahead: int = 2, pin: bool = False
) -> Iterator[T]:
    """``make(key)`` for each of the keys, in their order. As a rule a key is the indices of a batch.

    Args:
        make: what the processes do. They inherit it with all that it refers to; its results travel, pickled.
        keys: read as they are needed; they travel as well, so they had better be small.
        workers: loader processes; 0: made here, each when it is asked for.
        ahead: results that each process keeps ready.
        pin: whether tensors should lie in page-locked memory, for a GPU.

    Raises:
        UserError: the first that ``make`` raised, after everything that comes before it.
    """
    made: DataLoader[Any] = DataLoader(
        _Caught(make),
        sampler=keys,
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=workers,
        # Forked: a spawned process would import torch and open the data again, about ten seconds each.
        multiprocessing_context="fork" if workers else None,
        prefetch_factor=ahead if workers else None,
        pin_memory=pin,
    )
    for result in made:
        if isinstance(result, UserError):
            raise result
        yield result


def in_batches(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """The items in their order, ``size`` at a time; the last may be fewer."""
    return [items[start : start + size] for start in range(0, len(items), size)]


class _Caught(Dataset[Any], Generic[K, T]):
    """A function of a key as a torch data set, whose errors of the user's are values."""

    def __init__(self, make: Callable[[K], T]) -> None:
        self.make = make

    def __getitem__(self, key: K) -> T | UserError:
        try:
            return self.make(key)
        except UserError as error:
            return error


def _as_it_is(result: T) -> T:
    """Instead of torch's own, which makes tensors of arrays."""
    return result
