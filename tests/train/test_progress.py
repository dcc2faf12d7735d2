from __future__ import annotations

import io

from rich.console import Console

from vlbench.train.progress import watch

RECORD = {"step": 50, "loss": 2.5, "lr": 1e-3, "images_per_second": 100.0}


def test_watch_writes_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with watch(100, 128, console=Console(file=out)) as watcher:
        watcher.step(50, loss=2.5, images_per_second=100.0)
        watcher.record(RECORD)
        watcher.say("[resuming] from step 3")
    assert out.getvalue() == (
        "step 50/100  loss 2.5000  lr 1.00e-03  100 images/s  1:04 left\n[resuming] from step 3\n"
    )


def test_watch_says_how_long_data_were_waited_for_where_that_is_much() -> None:
    for terminal in (False, True):
        out = io.StringIO()
        with watch(100, 128, console=Console(file=out, force_terminal=terminal, width=120)) as watcher:
            watcher.record(RECORD | {"data_wait": 0.02})
            assert "waiting" not in out.getvalue()
            watcher.record(RECORD | {"data_wait": 0.42})
            watcher.step(50, loss=2.5, images_per_second=100.0)
        assert "images/s  42% waiting for data" in out.getvalue()


def test_watch_shows_one_live_line_on_a_terminal() -> None:
    out = io.StringIO()
    with watch(100, 128, console=Console(file=out, force_terminal=True, width=120)) as watcher:
        watcher.step(50, loss=2.5, images_per_second=100.0)
        watcher.record(RECORD)
    assert "50/100" in out.getvalue()
    assert "loss 2.500  100 images/s" in out.getvalue()
