"""The arguments of ``vlbench data``. Read at every call of the command line: nothing is loaded here."""

from __future__ import annotations

import argparse
from typing import Any


def fill(sub: argparse.ArgumentParser) -> None:
    """Give the parser of ``data`` its actions, each a parser of the same class."""
    actions = sub.add_subparsers(dest="action", metavar="ACTION", parser_class=type(sub), required=True)
    _check(_action(actions, "check", "data:run_check", "count what a data source holds and what is wrong with it"))
    _make(_action(actions, "make", "data:run_make", "write the embedded world to a folder"))
    _vocab(_action(actions, "vocab", "data:run_vocab", "learn a vocabulary from captions, for virtex or align"))
    _regions(_action(actions, "regions", "regions:run", "find the regions of images by a detector, for mu-VLA"))
    _weakly_align(
        _action(
            actions,
            "weakly-align",
            "weakly_align:run",
            "find sentences for images by the tags of their regions, for mu-VLA",
        )
    )
    _filter(_action(actions, "filter", "filter:run", "copy webdataset shards without what ALIGN's rules remove"))


def _action(actions: Any, name: str, run: str, help_text: str) -> argparse.ArgumentParser:
    """A parser whose words go to ``run`` (module of ``vlbench.verbs``, function)."""
    sub: argparse.ArgumentParser = actions.add_parser(
        name,
        help=help_text,
        description=help_text[0].upper() + help_text[1:] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    sub.set_defaults(run=f"vlbench.verbs.{run}", parser=sub)
    return sub


def _check(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("spec", help="e.g. imagefolder:DIR, hf:DIR, wds:'DIR/{000..009}.tar', csv:FILE")
    sub.add_argument("--split", help="one split only (default: all)")


def _make(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("world", choices=["shapes"])
    sub.add_argument("dir")
    sub.add_argument("--seed", type=int, default=0)


def _vocab(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("spec", nargs="+", help="data with captions, e.g. coco:DIR; the training split where there is one")
    sub.add_argument("--out", required=True, metavar="FILE")
    sub.add_argument(
        "--kind",
        choices=("sentencepiece", "wordpiece"),
        default="sentencepiece",
        help="sentencepiece: byte pairs, for virtex (default); wordpiece: as BERT's, for align",
    )
    sub.add_argument("--size", type=int, help="the most pieces (default: the papers' 10000 and 100000)")
    sub.add_argument(
        "--alphabet",
        type=int,
        metavar="N",
        help="wordpiece: most characters; words with rarer ones are [UNK] (default: 1000, or as many as all but 1 in "
        "100,000 letters need; never more than fill half of --size)",
    )
    sub.add_argument("--cased", action="store_true", help="wordpiece: keep capitals and accents")
    sub.add_argument("--language", action="append", metavar="CODE", help="of the captions (default: en); repeat")


def _regions(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("spec", nargs="+", help="images, e.g. wds:'cc3m/{00000..00331}.tar' or imagefolder:DIR")
    sub.add_argument(
        "--out",
        required=True,
        metavar="DIR",
        help="a new folder for one .npz an image, or a killed call's: gone on with",
    )
    sub.add_argument("--split", help="of the images (default: train, or all of unsplit data)")
    sub.add_argument(
        "--detector",
        default="fasterrcnn_resnet50_fpn_v2",
        metavar="NAME",
        help="a Faster R-CNN of torchvision's (default: fasterrcnn_resnet50_fpn_v2)",
    )
    sub.add_argument(
        "--weights",
        metavar="FILE",
        help="of the detector, or random (default: torchvision's own, where they were saved)",
    )
    sub.add_argument("--max-regions", type=int, default=100, metavar="N", help="most of an image (default: 100)")
    sub.add_argument("--min-score", type=float, default=0.2, metavar="P", help="leave out less certain ones (0.2)")
    sub.add_argument("--min-size", type=int, metavar="PX", help="shorter side read (default: the detector's own)")
    sub.add_argument("--max-size", type=int, metavar="PX", help="longer side at most (default: the detector's own)")
    sub.add_argument("--seed", type=int, default=0, help="of random weights (default: 0)")
    sub.add_argument("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    sub.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="most images at once, all of one size (default: 1)"
    )
    sub.add_argument("--workers", type=int, help="processes that decode images (default: one a core, at most 8)")
    sub.epilog = """\
examples:
  vlbench data regions wds:'cc3m/{00000..00331}.tar' --out regions --batch-size 8
  vlbench data regions coco:COCO --detector fasterrcnn_resnet50_fpn --weights fasterrcnn.pth --out regions

then `vlbench data weakly-align SPEC --features regions ...`: docs/muvla.md has the way to the end
"""


def _weakly_align(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("spec", nargs="+", help="images: with tagged regions (coco:DIR, shapes), or any with --features")
    sub.add_argument(
        "--pool",
        action="append",
        metavar="SPEC",
        help="sentences: a text file, one a line, or data whose captions are taken; may be repeated",
    )
    sub.add_argument("--out", required=True, metavar="FILE", help="the corpus, written whole or not at all")
    sub.add_argument(
        "--features", metavar="PATH", help="tags from region features: VinVL's .tsv, or what `data regions` writes"
    )
    sub.add_argument("--labels", metavar="FILE", help="of a .tsv of features without objects, the .tsv that has them")
    sub.add_argument("--split", help="of the images (default: train, or all of unsplit data)")
    sub.add_argument("--k", type=int, help="sentences an image (default: 5)")
    sub.add_argument("--encoder", help="tfidf (default), minilm, or a Sentence-Transformers name or folder")
    sub.add_argument("--chunker", help="noun phrases by spacy, by rules around the tags (tags), or auto (default)")
    sub.add_argument("--metric", choices=["cosine", "l2"], help="cosine: the paper (default); l2: its released code")
    sub.add_argument("--order", choices=["given", "sorted"], help="of the tags in a query (default: given)")
    sub.add_argument("--exclude-own", action="store_true", default=None, help="never give an image its own caption")
    sub.add_argument("--aligned", type=float, metavar="SHARE", help="share of images whose own caption comes first")
    sub.add_argument("--min-link", type=float, metavar="COSINE", help="leave out weaker links (default: 0)")
    sub.add_argument("--language", help="of captions, own and pooled (default: en)")
    sub.add_argument("--seed", type=int, help="of the pool's order and the aligned share (default: 0)")
    sub.epilog = """\
examples:
  vlbench data weakly-align shapes --out weak.arrow
  vlbench data weakly-align coco:COCO --pool bookcorpus.txt --encoder minilm --out weak.arrow
  vlbench data weakly-align coco:COCO --pool coco:COCO --exclude-own --k 10 --out weak.arrow
  vlbench data weakly-align wds:CC --features regions --pool bookcorpus.txt --out weak.arrow
  vlbench data weakly-align wds:CC --features features.tsv --labels labels.tsv --pool wds:CC --out weak.arrow
"""


def _filter(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("src", metavar="SRC", help="shards in img2dataset's layout: wds:DIR or wds:'DIR/{000..331}.tar'")
    sub.add_argument("dst", metavar="DST", help="a new folder, or that of a killed call, which is then gone on with")
    sub.add_argument("--min-side", type=int, metavar="PX", help="shorter side must be larger (default: 200)")
    sub.add_argument("--max-aspect", type=float, metavar="X", help="longer over shorter side must be less (default: 3)")
    sub.add_argument("--max-texts", type=int, metavar="N", help="most different texts of an image (default: 1000)")
    sub.add_argument("--max-images", type=int, metavar="N", help="most different images of a text (default: 10)")
    sub.add_argument(
        "--top-ngrams", type=int, metavar="N", help="a text may hold only the N most frequent words and pairs (1e8)"
    )
    sub.add_argument("--min-words", type=int, metavar="N", help="fewest words of a text (default: 3)")
    sub.add_argument("--max-words", type=int, metavar="N", help="most words of a text (default: 20)")
    sub.add_argument("--against", action="append", metavar="SPEC", help="drop near-duplicates of these test images")
    sub.add_argument("--near-duplicates", metavar="HOW", help="phash (default), or a model as in eval --model")
    sub.add_argument("--max-distance", type=int, metavar="BITS", help="phash: differing bits of 64 (default: 4)")
    sub.add_argument("--min-cosine", type=float, metavar="X", help="model: cosine must be larger (default: 0.975)")
    sub.add_argument("--skip", action="append", metavar="RULE", help="switch a rule off; repeat for more")
    sub.add_argument(
        "--decode", action="store_true", default=None, help="decode every image in full (with --against: always)"
    )
    sub.add_argument("--allow-truncated", action="store_true", default=None, help="take what lies before a shard's cut")
    sub.add_argument("--list-removed", choices=["jsonl", "parquet"], help="list every removed sample in DST/removed.*")
    sub.add_argument("--keep-state", action="store_true", help="leave DST/.state, which a killed call goes on from")
    sub.add_argument("--workers", type=int, help="processes (default: one a core, at most 8); the output is the same")
    sub.add_argument("--memory", type=int, default=512, metavar="MIB", help="of counting, a process (default: 512)")
    sub.add_argument("--device", help="model: cpu, cuda, cuda:1 (default: cuda where there is one)")
    sub.add_argument("--batch-size", type=int, default=128, help="model: images per forward pass (default: 128)")
    sub.epilog = """\
rules, in order: unreadable, incomplete, small, aspect, many-texts, near-duplicate, shared-text, rare-ngram, length

example:
  vlbench data filter wds:'cc3m/{00000..00331}.tar' cc3m-filtered --against coco:coco --against karpathy:flickr30k
"""
