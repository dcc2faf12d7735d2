"""What every process but the first does under ``torchrun``: its share of the encoding, in silence (``verbs.crew``)."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from vlbench.core.errors import UserError
from vlbench.verbs.crew import Crew, Lost, Order, Place, quiet
from vlbench.verbs.session import Session, open_session


def serve(args: argparse.Namespace, crew: Crew, *, join_in: Callable[[Order, Session], None]) -> int:
    """Encode a share of whatever the first process asks for, until it ends. Returns its exit status.

    Args:
        args: of ``vlbench eval``.
        crew: all processes.
        join_in: does what all do together; an error is the first's too, unless it is Lost.
    """
    session: Session | None = None
    with quiet():
        try:
            with contextlib.suppress(Exception), crew.settling():
                session = open_session(args, crew)
            while (order := crew.take()).what != "end":
                if session is None:
                    continue
                if order.what == "open":
                    with contextlib.suppress(Exception):  # what is wrong is said when images are asked for
                        _indices(order.place, session)
                elif order.what == "together":
                    try:
                        join_in(order, session)
                    except Lost:
                        raise
                    except Exception:  # the first has it too, and says it
                        continue
                else:
                    with contextlib.suppress(Exception), crew.settling():
                        _encode_share(order, crew.share(order.keys), session)
            return order.status
        except Lost:
            return 1


def _encode_share(order: Order, mine: Sequence[str], session: Session) -> None:
    encoder = session.encoder_in(order.precision)
    if order.what == "texts":
        encoder.encode_texts(mine)
        return
    left = set(mine)
    for source, index_of in _indices(order.place, session):
        here = left & index_of.keys()
        if here:
            encoder.encode_images(source, {image: index_of[image] for image in here})
        left -= here
    if left:
        raise UserError(f"{order.place.spec}: {len(left)} images are not in the data that this process reads")


def _indices(place: Place, session: Session) -> list[tuple[Any, dict[str, int]]]:
    """Each source of the task at hand with its images: digest → index."""
    data = session.opened(place.spec, dict(place.splits))
    sources = [data.split(role) for role in place.roles]
    others = _indices(place.learnt, session) if place.learnt is not None else []
    return others + [
        (source, {image: index for index, image in enumerate(session.encoder.image_digests(source))})
        for source in sources
    ]
