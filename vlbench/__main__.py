"""``python -m vlbench``: the same command line as ``vlbench``."""

from vlbench.cli import program

raise SystemExit(program())
