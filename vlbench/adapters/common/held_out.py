"""Which training examples a fine-tuned model does not learn from, so that no reported split has to choose.

Held out are images, with everything that is asked of them, in the order of their digests: random to their content, the
same on any machine and in any order of files. Examples about several images (NLVR2's pairs) hang together where they
share one or are of one group (its sets), and what hangs together stays on one side.

N examples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence, Sized
from typing import Any, TypeVar

import numpy as np

from vlbench.core.errors import UserError
from vlbench.core.fingerprint import fingerprint
from vlbench.core.types import Source

T = TypeVar("T", bound=Sized)


def learn_and_choose(
    data: Any,
    share: float,
    *,
    read: Callable[[Source], T],
    take: Callable[[T, Sequence[int]], T],
    images: Callable[[T], Sequence[Sequence[str]]],
    groups: Callable[[T], Sequence[str] | None] = lambda train: None,
    unit: str,
) -> tuple[T, T, tuple[str, ...], list[str]]:
    """What is learnt from and what is chosen on: val where another split is reported, else a share of train.

    Args:
        data: a ``data.taskdata.TaskData``, which has no val where val is reported.
        share: of the distinct training images, held out where val does not choose.
        read: what a split is to be.
        take: some of the examples of what ``read`` gave.
        images: the digests of the images of each example.
        groups: of each example, where there are such: see ``held_out_by_image``.
        unit: what the note says was counted.

    Returns:
        What is learnt from, what is chosen on, the roles of the splits that both are of, and a note where images are
        held out.

    Raises:
        UserError: where no training image can be held out.
    """
    train = read(data.split("train"))
    if data.has("val"):
        return train, read(data.split("val")), ("train", "val"), []
    held_N = held_out_by_image(images(train), share, where=data.spec, groups=groups(train))
    learn, choose = (take(train, np.flatnonzero(rows).tolist()) for rows in (~held_N, held_N))
    return learn, choose, ("train",), [f"chosen on {len(choose):,} of {len(train):,} training {unit}"]


def held_out_by_image(
    images: Sequence[Sequence[str]], share: float, *, where: str, groups: Sequence[str] | None = None
) -> np.ndarray:
    """Which examples to hold out, ``(N,)`` bool: at least one image and about ``share`` of the distinct ones.

    Args:
        images: the digests of the images of each example.
        share: of the distinct images, in (0, 1).
        where: what the data are called, for the error.
        groups: of each example; examples of one group stay together.

    Raises:
        UserError: where all images hang together, so that none can be held out.
    """
    assert 0 < share < 1, f"a share of {share} of the images"
    kin_N = _kin(
        images if groups is None else [(*own, f"group {name}") for own, name in zip(images, groups, strict=True)]
    )
    members: defaultdict[str, set[str]] = defaultdict(set)
    for group, own in zip(kin_N, images):
        members[group].update(own)
    if len(members) < 2:
        raise UserError(f"{where}: all training examples share images, so none can be held out to choose on")
    wanted = share * sum(map(len, members.values()))
    # By the digest of the whole group: by its smallest image's, large groups would come first.
    queue = sorted(members, key=lambda group: fingerprint(sorted(members[group])))
    # A group larger than all that is wanted would leave too little to learn from; without others, the smallest goes.
    small = [group for group in queue if len(members[group]) <= max(wanted, 1)]
    small = small or [min(queue, key=lambda group: len(members[group]))]
    held: set[str] = set()
    count = 0
    for group in small[: len(queue) - 1]:
        # The first is taken whatever its size; another only where it brings the count nearer to what is wanted.
        if held and abs(count + len(members[group]) - wanted) > abs(count - wanted):
            continue
        held.add(group)
        count += len(members[group])
    return np.array([group in held for group in kin_N], dtype=bool)


def _kin(links: Sequence[Sequence[str]]) -> list[str]:
    """One name, the same for all, of what each example hangs together with by the names that it shares."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for own in links:
        for name in own:
            parent.setdefault(name, name)
        for name in own[1:]:
            parent[root(name)] = root(own[0])
    return [root(own[0]) for own in links]
