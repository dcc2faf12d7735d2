"""The command line: the argument tree and nothing else; that of ``data``, which has verbs of its own, lies beside them.

Every verb is one module of ``vlbench.verbs``, imported when it is called, so that ``vlbench --help`` and
``vlbench list`` answer without loading torch. Exit status: 0 all done; 1 something failed, the rest is finished
and stored; 2 the words of the call are wrong.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from vlbench import __version__
from vlbench.core.errors import RunError, UserError
from vlbench.core.names import nearest, unknown
from vlbench.verbs import data_arguments

_EXAMPLES = """\
examples:
  vlbench demo                                         the whole loop on the embedded world, in minutes
  vlbench pretrain unicl                               works with nothing else said; prints where ckpt.pt is
  vlbench eval --model runs/unicl-tiny-s0/ckpt.pt --tasks zeroshot,linear,retrieval
  vlbench eval --model timm:resnet50.a1_in1k --tasks linear,knn --data imagefolder:DIR
  vlbench compare unicl-tiny-s0 clip-tiny-s0           paired tests on the same examples
  vlbench explain unicl-tiny-s0 clip-tiny-s0           what differs in their settings, before their numbers
  vlbench verify --all                                 stored results against the numbers that papers printed
  vlbench leaderboard                                  regenerates results/LEADERBOARD.md
"""


class _Parser(argparse.ArgumentParser):
    """argparse with the nearest valid word in its complaints."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            what = {"verb": "command"}.get(action.dest, action.dest)
            raise argparse.ArgumentError(None, unknown(what, str(value), map(str, action.choices)))

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")

    def options(self) -> list[str]:
        """Every long option that this parser takes."""
        return [word for word in self._option_string_actions if word.startswith("--")]


def build_parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The whole argument tree, and each verb's own parser by name."""
    parser = _Parser(
        prog="vlbench",
        description="Pretrain visual backbones under different recipes; measure what each is worth, with error bars.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"vlbench {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = parser.add_subparsers(dest="verb", metavar="COMMAND", parser_class=_Parser)
    by_name: dict[str, _Parser] = {}
    for name, module, help_text, fill in _VERBS:
        sub = verbs.add_parser(
            name,
            help=help_text,
            description=help_text[0].upper() + help_text[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.set_defaults(run=module)
        sub.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help="show tracebacks")
        fill(sub)
        by_name[name] = sub
    return parser, by_name


def program() -> int:
    """``main`` as a process of its own: what the ``vlbench`` command calls.

    torch makes some hundred thousand objects as it loads, none of them garbage. The collector would look through them
    again and again meanwhile, and once more when the process ends: half a second of a short command's three. But what
    triton made, which torchvision loads, must be collected then: it prints sixty lines about all that is not.
    """
    gc.set_threshold(10_000, 10, 10)
    try:
        return main()
    finally:
        if "triton" not in sys.modules:
            gc.freeze()


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status."""
    # Read by the OpenMP runtime when torch is first imported. A pool that spins while it waits is several times slower
    # on shared cores; one that never spins is woken for every small operation, which costs a third on idle ones. So a
    # few microseconds.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    # Heavy arithmetic is torch's. numpy's and scipy's OpenBLAS would keep pools of their own, whose threads spin after
    # every small product beside torch's: a linear probe's fit of 2,000 x 128 features takes seven times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    debug = False
    try:
        parser, by_name = build_parser()
        args, extra = parser.parse_known_args(argv)
        debug = args.debug
        if args.verb is None:
            parser.print_help()
            return 2
        if extra:
            _complain(extra, getattr(args, "parser", by_name[args.verb]))
        module, _, function = args.run.partition(":")
        return int(getattr(importlib.import_module(module), function)(args))
    except RunError as error:
        return _refuse(error, debug=debug, status=1)
    except UserError as error:
        return _refuse(error, debug=debug, status=2)
    except KeyboardInterrupt:
        print("vlbench: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vlbench list tasks | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            traceback.print_exc()
        print(
            f"vlbench: this is a defect of vlbench, not of your call: {type(error).__name__}: {error}\n"
            "vlbench: run it again as `vlbench --debug ...` for the traceback, and please report it",
            file=sys.stderr,
        )
        return 1


def _refuse(error: UserError, *, debug: bool, status: int) -> int:
    if debug:
        traceback.print_exc()
    print(f"vlbench: error: {error}", file=sys.stderr)
    return status


def _complain(extra: list[str], parser: _Parser) -> NoReturn:
    word = extra[0].partition("=")[0]
    if word.startswith("-"):
        guess = nearest(word, parser.options())
        hint = f"; did you mean {guess}?" if guess else ""
        raise UserError(f"unknown option {word}{hint} (see `{parser.prog} --help`)")
    raise UserError(f"unexpected {word!r} (see `{parser.prog} --help`)")


# ------------------------------------------------------------------------------------------------- the verbs


def _results(sub: _Parser) -> None:
    sub.add_argument("--results", default="results", metavar="DIR", help="where results are stored (default: results)")


def _demo(sub: _Parser) -> None:
    sub.add_argument("--out", default="demo", metavar="DIR", help="where everything goes (default: demo)")
    sub.add_argument("--steps", type=int, help="training steps of each recipe (default: the tiny preset's)")


def _pretrain(sub: _Parser) -> None:
    sub.add_argument("recipe", help="see `vlbench list recipes`")
    sub.add_argument(
        "--data",
        action="append",
        metavar="SPEC",
        help="data source, e.g. wds:'cc3m/{000..331}.tar'; repeat to mix: A@2 B@1",
    )
    sub.add_argument("--preset", default="tiny", help="a recipe's named settings: tiny (CPU, minutes) or paper")
    sub.add_argument("--variant", metavar="NAME", help="of the recipe; `vlbench show recipe NAME` lists them")
    sub.add_argument("--backbone", metavar="ARCH", help="image tower, e.g. timm:resnet50 or open_clip:ViT-B-32")
    sub.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="change one setting: optim.lr=3e-4"
    )
    sub.add_argument("--seed", type=int, help="seed of initialisation, data order and augmentation")
    sub.add_argument("--steps", type=int, help="optimizer steps")
    sub.add_argument("--checkpoint-every", type=int, metavar="N", help="steps between checkpoints")
    sub.add_argument("--out", metavar="DIR", help="run folder (default: runs/<recipe>[-<variant>]-<preset>-s<seed>)")
    sub.add_argument("--resume", action="store_true", help="go on from the folder's last checkpoint")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    sub.add_argument("--precision", choices=["fp32", "bf16"], help="bf16: autocast")
    sub.add_argument("--compile", action="store_true", default=None, help="torch.compile the model")


def _eval(sub: _Parser) -> None:
    sub.add_argument(
        "--model",
        required=True,
        help="ckpt.pt, a run folder, a reference card, timm:, open_clip:, torchvision: or hf:NAME, or pkg.mod:build",
    )
    sub.add_argument("--tasks", required=True, help="cards (linear/cifar10), kinds (linear) and suites, by commas")
    sub.add_argument("--weights", help="a local file for the architecture, or random[:SEED]")
    sub.add_argument("--name", help="the model's name in results and tables")
    sub.add_argument(
        "--data",
        action="append",
        metavar="SPEC",
        help="run the named kinds on your own data, e.g. imagefolder:DIR; repeat for more",
    )
    sub.add_argument(
        "--data-root", metavar="DIR", help="where task cards look for data (default: $VLBENCH_DATA or ./data)"
    )
    sub.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a setting of the tasks' protocol (preset=paper, search=[0.3,1,3]); stored under a name of its own",
    )
    _results(sub)
    sub.add_argument("--batch-size", type=int, default=128, help="images per forward pass (default: 128)")
    sub.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of the forward pass")
    sub.add_argument("--precision-spread", action="store_true", help="measure in bf16 too, and say what that changes")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    sub.add_argument("--workers", type=int, help="image decoding processes (default: one a core, at most 8)")
    sub.add_argument("--force", action="store_true", help="measure again what is already stored")
    sub.add_argument("--no-store", action="store_true", help="neither read nor keep features")


def _compare(sub: _Parser) -> None:
    sub.add_argument("a", help="a model's name, as in the leaderboard")
    sub.add_argument("b", help="the model to compare it with")
    sub.add_argument("--metric", help="compare on this metric (default: each task's headline metric)")
    _results(sub)
    sub.epilog = """\
examples:
  vlbench compare clip-s0 unicl-s0
  vlbench compare clip-s0 unicl-s0 --metric mean_per_class_recall
"""


def _explain(sub: _Parser) -> None:
    sub.add_argument("a", help="a model's name, as in the leaderboard, or a stored result's JSON file")
    sub.add_argument("b", help="the model or file to set beside it")
    sub.add_argument("--task", help="this task only, with every metric (default: every task that both have)")
    _results(sub)
    sub.epilog = """\
examples:
  vlbench explain clip-s0 unicl-s0
  vlbench explain clip-s0 unicl-s0 --task linear/shapes
  vlbench explain results/clip-s0/linear/shapes@v1.json ../theirs/clip-s0/linear/shapes@v1.json

A paired test needs the per-example rows: the .parquet file beside each JSON file.
"""


def _verify(sub: _Parser) -> None:
    sub.add_argument("model", nargs="*", metavar="MODEL", help="reference models (default: those with a stored result)")
    sub.add_argument("--all", action="store_true", help="every reference model, every published number on its own line")
    sub.add_argument(
        "--tolerance",
        type=float,
        default=0.005,
        metavar="FRACTION",
        help="largest difference that still counts as reproduced (default: 0.005, half a point)",
    )
    sub.add_argument("--json", metavar="FILE", help="write the rows here too")
    _results(sub)
    sub.epilog = """\
examples:
  vlbench verify
  vlbench verify clip-vit-b-32-openai --tolerance 0.002
  vlbench verify --all --json published.json

A published number is reproduced where it lies within the tolerance of ours, or else within our 95% interval. Only a
model's own weights count as an attempt: never random ones, nor others under its name. A file given to a card that knows
no checksum (--model CARD --weights FILE) is judged, and the verdict says that the file could not be checked. Where two
sources print different numbers of one measurement and ours is one of them, the other is shown as "sources disagree";
where it is neither, both are off. Exit status: 0 nothing is off; 1 something is.
"""


def _leaderboard(sub: _Parser) -> None:
    sub.add_argument("--check", action="store_true", help="write nothing; fail where the stored table is stale")
    sub.add_argument("--html", metavar="FILE", help="write the same tables, sortable, as one HTML file too")
    _results(sub)
    sub.epilog = """\
examples:
  vlbench leaderboard                        writes results/LEADERBOARD.md
  vlbench leaderboard --html board.html      and the same as one page for a browser
  vlbench leaderboard --check                for continuous integration: fails where the table is stale
"""


def _study(sub: _Parser) -> None:
    sub.add_argument("file", help="a study: recipes, backbones, seeds, budget and tasks, as YAML")
    sub.add_argument("--out", metavar="DIR", help="run folders (default: runs/<file name>)")
    sub.add_argument("--table-only", action="store_true", help="train and measure nothing: the table of what is stored")
    sub.add_argument("--check", action="store_true", help="only say whether the stored table is current")
    _results(sub)
    sub.epilog = """\
examples:
  vlbench study benchmarks/studies/recipes.yaml                 trains, measures, writes results/studies/recipes.md
  vlbench study benchmarks/studies/recipes.yaml --table-only    that table again, of stored results
"""


def _list(sub: _Parser) -> None:
    things = ["recipes", "tasks", "datasets", "suites", "models", "readers", "adapters", "loaders"]
    sub.add_argument("what", choices=things)
    sub.add_argument("--data-root", metavar="DIR", help="for tasks: say which data are present")


def _show(sub: _Parser) -> None:
    sub.add_argument("what", choices=["recipe", "task", "dataset", "model"])
    sub.add_argument("name")
    sub.add_argument("--preset", metavar="NAME", help="for recipes: this preset alone, in full")


def _doctor(sub: _Parser) -> None:
    sub.add_argument("--data-root", metavar="DIR", help="where task cards look for data")


_VERBS = (
    ("demo", "vlbench.verbs.demo:run", "pretrain, evaluate and rank on the embedded world", _demo),
    ("pretrain", "vlbench.verbs.pretrain:run", "train a backbone under a recipe", _pretrain),
    ("eval", "vlbench.verbs.evaluate:run", "measure a backbone on tasks and store the results", _eval),
    ("compare", "vlbench.verbs.compare:run", "test whether two stored models differ", _compare),
    (
        "explain",
        "vlbench.verbs.explain:run",
        "show what differs in the settings behind two models' results, then in their numbers",
        _explain,
    ),
    ("verify", "vlbench.verbs.verify:run", "check stored results against published numbers", _verify),
    (
        "leaderboard",
        "vlbench.verbs.leaderboard:run",
        "regenerate the Markdown leaderboard from stored results",
        _leaderboard,
    ),
    ("study", "vlbench.verbs.study:run", "recipes, backbones and seeds at equal budget, resumable", _study),
    ("list", "vlbench.verbs.listing:run_list", "list what there is", _list),
    ("show", "vlbench.verbs.listing:run_show", "show one recipe, task or model in full", _show),
    ("data", "vlbench.verbs.data:run_check", "check a data source, or make the embedded world", data_arguments.fill),
    ("doctor", "vlbench.verbs.doctor:run", "say what works on this machine and what is missing", _doctor),
)
