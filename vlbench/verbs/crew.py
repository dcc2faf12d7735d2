"""``vlbench eval`` under ``torchrun``: the first process measures, all of them encode.

The first runs as if it were alone. Where features are missing it deals them out: each process encodes its share and
appends it to the feature store as it comes (shards appear whole, so writers need no lock); when all have said that they
are done, the first reads what it needs. The others wait for orders, write no result, print nothing, and end with the
first one's status. No image is encoded twice, and no batch is padded to make shares equal.

A task whose adapter trains (``trains = True``) is done by all of them ``together``: every process runs the adapter's
predict on the same data, so that the trainer sees the process group; what is missing in the feature store is then
dealt out without orders, since all come to the same place and ask. The first alone scores and stores. An adapter that
trains nothing is run so too where no order can say what is to be done (``together = True``: pairs to be scored).

Orders and answers are small objects over gloo, on GPUs as on CPUs; gradients go over NCCL where there are GPUs. An
error in one process travels in its answer and fails the task in the first, with one line; while all train, an error
that the others do not share ends the call, since they wait for that process. A process that dies closes its
connections, which ends the others at once; ``PATIENCE`` is for one that hangs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from vlbench.core.errors import RunError, UserError
from vlbench.core.files import write_text

PATIENCE = timedelta(hours=24)
"""A process may wait as long for another's share, or for a classifier to be fitted."""
GRACE = 10.0
"""Seconds in which an error that all processes have in common reaches all of them."""
_GONE = "a process that torchrun started is gone"
_APART = "the processes that torchrun started do not find one another"


class Lost(RunError):
    """Another process is gone: nothing can be done together any more."""


class Told(Lost):
    """Another process has failed alone, and says so itself."""


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

    what: Literal["open", "images", "texts", "together", "end"]
    place: Place | None = None
    """Where the images are."""
    keys: Sequence[str] = ()
    """Digests of images, or texts, to be divided over all processes."""
    precision: str = "fp32"
    choice: Any = None
    """A ``verbs.selection.Choice``, for what is done together."""
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
    is_together: bool = field(default=False, init=False)
    """Whether all processes do the same now: nobody waits for orders."""
    last_words: str | None = field(default=None, init=False)
    """Of this process, where it failed alone while all trained: it says them at its end, others end in silence."""
    _blocks: int = field(default=0, init=False)

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
        if self.first:
            self.give(Order("open", place))

    def dealing(self, precision: str) -> Callable[[str, Sequence[str]], contextlib.AbstractContextManager[Any]]:
        """What an Encoder takes as ``share``."""

        @contextlib.contextmanager
        def deal(what: Literal["images", "texts"], keys: Sequence[str]) -> Iterator[Sequence[str]]:
            if self.is_together:
                # What the first lacks; and nobody appends a row before all have looked what is missing.
                keys = self._gather(list(keys))[0]
            else:
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
        order: Order = self._broadcast(None)
        return order

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

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Do the block in every process, each asking the others for the same things in the same order.

        Raises:
            Exception: its own, where all processes fail.
            Lost: where another process is gone, and with its own line where it fails and the others do not.
        """
        if self.world == 1:
            yield
            return
        self._blocks += 1
        self.is_together = True
        try:
            yield
            self._gather(None)
        except Exception as error:
            self._settle_failure(error)
            raise
        finally:
            self.is_together = False

    def _settle_failure(self, error: Exception) -> None:
        """Return where all processes have failed in the block, soon or now. Raises Lost where they have not."""
        from vlbench.train.distributed import is_broken_connection

        if isinstance(error, Lost) or is_broken_connection(error):
            words = self._last_words_of_others()
            if words:
                raise Told(words[0]) from None
            raise Lost(f"{_GONE} ({str(error).splitlines()[0][:120]})") from None
        assert self.scratch is not None, "processes that were started together have a folder"
        line = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        write_text(self._words_of(self.rank), line)
        deadline = time.monotonic() + GRACE
        while len(self._last_words_of_others()) < self.world - 1:
            if time.monotonic() > deadline:
                self.last_words = f"{line} (process {self.rank} of {self.world})"
                raise Lost(self.last_words) from error
            time.sleep(0.05)

    def _words_of(self, rank: int) -> Path:
        assert self.scratch is not None, "processes that were started together have a folder"
        return self.scratch / f"failed-{self._blocks}-{rank}"

    def _last_words_of_others(self) -> list[str]:
        paths = {rank: self._words_of(rank) for rank in range(self.world) if rank != self.rank}
        return [f"{path.read_text()} (process {rank} of {self.world})" for rank, path in paths.items() if path.exists()]

    def _gather(self, value: Any) -> list[Any]:
        if self.world == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.world
        with _reaching_all():
            dist.all_gather_object(found, value)
        return found

    def _broadcast(self, value: Any) -> Any:
        import torch.distributed as dist

        box = [value]
        with _reaching_all():
            dist.broadcast_object_list(box, src=0)
        assert box[0] is not None, "the first process sent nothing"
        return box[0]


def started_together() -> int:
    """How many processes ``torchrun`` started, this one among them; 1 where it did not start this one.

    A scheduler may set ``WORLD_SIZE`` for a process that runs alone; ``RANK`` beside it is torchrun's.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


@contextlib.contextmanager
def joined(device: str | None = None) -> Iterator[Crew]:
    """The processes that ``torchrun`` started, this one among them; alone where it did not start this one.

    Args:
        device: as the user names it; None: a GPU each where there are some.

    Raises:
        Lost: where they do not find one another.
    """
    world = started_together()
    if world == 1:
        yield Crew()
        return
    import torch.distributed as dist

    with _reaching_all(_APART):
        dist.init_process_group(_backend(device), timeout=PATIENCE)
    rank = dist.get_rank()
    folder = tempfile.mkdtemp(prefix="vlbench-") if rank == 0 else ""
    crew: Crew | None = None
    try:
        box = [folder]
        with _reaching_all(_APART):
            dist.broadcast_object_list(box, src=0)
        crew = Crew(rank, world, Path(box[0]), int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        yield crew
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        elif crew is not None and crew.last_words is not None:
            print(f"vlbench: error: {crew.last_words}", file=sys.stderr, flush=True)
        dist.destroy_process_group()


def _backend(device: str | None) -> str:
    import torch

    return "cpu:gloo,cuda:nccl" if device != "cpu" and torch.cuda.is_available() else "gloo"


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
