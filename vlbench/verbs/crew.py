"""``vlbench eval`` under ``torchrun``: the first process measures, all of them encode.

The first runs as if it were alone. Where features are missing it deals them out: each process encodes its share and
appends it to the feature store as it comes (shards appear whole, so writers need no lock); when all have said that they
are done, the first reads what it needs. The others wait for orders, write no result, print nothing, and end with the
first one's status. No image is encoded twice, and no batch is padded to make shares equal.

Orders and answers are small objects over gloo, on GPUs as on CPUs: no tensor travels, so NCCL has nothing to do. An
error in one process travels in its answer and fails the task in the first, with one line. A process that dies closes
its connections, which ends the others at once; ``PATIENCE`` is for one that hangs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from vlbench.core.errors import RunError, UserError

PATIENCE = timedelta(hours=24)
"""A process may wait as long for another's share, or for a classifier to be fitted."""
_GONE = "a process that torchrun started is gone"
_APART = "the processes that torchrun started do not find one another"


class Lost(RunError):
    """Another process is gone: nothing can be done together any more."""


@dataclass(frozen=True)
class Place:
    """Data that every process opens for itself."""

    spec: str
    splits: tuple[tuple[str, str], ...]
    """(role, the data's own split), where they differ."""
    roles: tuple[str, ...]
    """The roles whose images may be asked for."""
    learnt: Place | None = None
    """Other data that the task learns from, where it does."""


@dataclass(frozen=True)
class Order:
    """What the first process asks of the others."""

    what: Literal["open", "images", "texts", "end"]
    place: Place | None = None
    """Where the images are."""
    keys: Sequence[str] = ()
    """Digests of images, or texts, to be divided over all processes."""
    precision: str = "fp32"
    status: int = 0


@dataclass
class Crew:
    """The processes of one call; one that is alone has nothing to wait for."""

    rank: int = 0
    world: int = 1
    scratch: Path | None = None
    """A folder of this call that all of them see, for features that are not kept."""
    local: int = 1
    """How many of them are on this machine and share its cores."""
    place: Place | None = field(default=None, init=False)
    """The data of the task at hand, said to the others with every order."""

    @property
    def first(self) -> bool:
        """Whether this process measures, writes and talks."""
        return self.rank == 0

    def share(self, keys: Sequence[str]) -> Sequence[str]:
        """The part of this process: neighbours stay together, since an archive is read best in its order."""
        return keys[len(keys) * self.rank // self.world : len(keys) * (self.rank + 1) // self.world]

    def go_to(self, place: Place) -> None:
        """Name the data of the next task, so that the others read them while the first does."""
        self.place = place
        self.give(Order("open", place))

    def dealing(self, precision: str) -> Callable[[str, Sequence[str]], contextlib.AbstractContextManager[Any]]:
        """What an Encoder takes as ``share``."""

        @contextlib.contextmanager
        def deal(what: Literal["images", "texts"], keys: Sequence[str]) -> Iterator[Sequence[str]]:
            self.give(Order(what, self.place, list(keys), precision))
            with self.settling():
                yield self.share(keys)

        return deal

    def give(self, order: Order) -> None:
        """Send an order to the others."""
        if self.world > 1:
            self._broadcast(order)

    def take(self) -> Order:
        """Wait for the next order. Raises Lost where the first process is gone."""
        return self._broadcast(None)

    @contextlib.contextmanager
    def settling(self) -> Iterator[None]:
        """Do the block in every process, then wait for all.

        Raises:
            UserError: where the block has failed in another process, with that one's line; its own error comes first.
            Lost: where another process is gone.
        """
        try:
            yield
        except Lost:
            raise
        except Exception as error:
            self._gather(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")
            raise
        lines = self._gather(None)
        for rank, line in enumerate(lines):
            if line is not None:
                raise UserError(f"{line} (process {rank} of {self.world})")

    def _gather(self, line: str | None) -> list[str | None]:
        if self.world == 1:
            return [line]
        import torch.distributed as dist

        found: list[str | None] = [None] * self.world
        with _reaching_all():
            dist.all_gather_object(found, line)
        return found

    def _broadcast(self, order: Order | None) -> Order:
        import torch.distributed as dist

        box = [order]
        with _reaching_all():
            dist.broadcast_object_list(box, src=0)
        assert box[0] is not None, "the first process sent no order"
        return box[0]


def started_together() -> int:
    """How many processes ``torchrun`` started, this one among them; 1 where it did not start this one.

    A scheduler may set ``WORLD_SIZE`` for a process that runs alone; ``RANK`` beside it is torchrun's.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextlib.contextmanager
def joined() -> Iterator[Crew]:
    """The processes that ``torchrun`` started, this one among them; alone where it did not start this one.

    Raises:
        Lost: where they do not find one another.
    """
    world = started_together()
    if world == 1:
        yield Crew()
        return
    import torch.distributed as dist

    with _reaching_all(_APART):
        dist.init_process_group("gloo", timeout=PATIENCE)
    rank = dist.get_rank()
    folder = tempfile.mkdtemp(prefix="vlbench-") if rank == 0 else ""
    try:
        box = [folder]
        with _reaching_all(_APART):
            dist.broadcast_object_list(box, src=0)
        yield Crew(rank, world, Path(box[0]), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        dist.destroy_process_group()


def own_device(name: str | None) -> str | None:
    """The device of this process: under ``torchrun`` each takes a GPU of its own.

    Raises:
        UserError: where they would all take the same one, or there are too few.
    """
    if started_together() == 1:
        return name
    if name is not None and name.startswith("cuda:"):
        raise UserError(f"--device {name}: every process of torchrun would take this one; say --device cuda")
    if name not in (None, "cuda"):
        return name
    import torch

    if name is None and not torch.cuda.is_available():
        return "cpu"
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"process {index} of this machine has no GPU of its own: there are {count}; start {count}")
    return f"cuda:{index}"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nothing of what the block says is shown."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def _reaching_all(trouble: str = _GONE) -> Iterator[None]:
    try:
        yield
    # RuntimeError: a closed connection or a spent patience. ValueError: an address that torchrun would have set.
    except (RuntimeError, ValueError) as error:
        raise Lost(f"{trouble} ({str(error).splitlines()[0][:120]})") from None
