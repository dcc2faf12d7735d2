"""RefCOCO's ``refs(unc).p`` as JSON, without trusting the file: a pickle is a program, and this one comes from the web.

Only those opcodes are let through that write plain data (lists, dicts, sets, tuples, texts, numbers, bytes, True,
False, None). Whatever would look up a name, call it, or build an object is refused before anything is loaded, and the
unpickler that then loads the rest has no names to give either. A well-formed file, as lichengunc/refer published
them, has nothing else.

``python -m vlbench.data.refer_convert 'DIR/refs(unc).p'`` writes ``DIR/refs(unc).json``, which the reader ``refcoco``
reads.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vlbench.core.errors import UserError
from vlbench.core.files import write_text

_PLAIN = """
PROTO FRAME STOP MARK POP POP_MARK NONE NEWTRUE NEWFALSE
INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT
STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
BINBYTES SHORT_BINBYTES BINBYTES8
EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3
EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET
GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
"""
_STORES = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_REF = {"ref_id": int, "ann_id": int, "image_id": int, "category_id": int, "split": str, "sentences": list}


class _NoNames(pickle.Unpickler):
    """The second lock: whatever asks for a name gets none."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError("it asks for an object that is kept elsewhere")


def load_plain(data: bytes, *, where: str) -> Any:
    """What a pickle of plain data says.

    Args:
        data: its bytes. Texts of Python 2 are read as UTF-8, with surrogates for what is none.
        where: how to call it in an error.

    Raises:
        UserError: where it is no whole pickle, or holds anything but plain data. Nothing of it has run then.
    """
    _refuse_programs(data, where)
    try:
        return _NoNames(io.BytesIO(data), encoding="utf-8", errors="surrogateescape").load()
    # A whole pickle of plain opcodes can still be nonsense, and then fails in as many ways as there are types.
    except Exception as error:
        raise UserError(f"{where}: not a well-formed pickle: {type(error).__name__}: {error}") from None


def convert(path: Path | str, out: Path | str | None = None) -> Path:
    """Write the references of a ``refs(*).p`` as JSON and return the file.

    Args:
        path: the pickle.
        out: the JSON; None: beside the pickle, under its name.

    Raises:
        UserError: where it cannot be read, is no plain data, or is no list of references.
    """
    path = Path(path).expanduser()
    out = path.with_suffix(".json") if out is None else Path(out).expanduser()
    if out.resolve() == path.resolve():
        raise UserError(f"{path}: it would be written over; name another file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    refs = load_plain(data, where=str(path))
    if not isinstance(refs, list) or not refs:
        raise UserError(f"{path}: expected a list of references, got {type(refs).__name__}")
    lines = [json.dumps(_reference(ref, f"{path}, reference {n}"), ensure_ascii=False) for n, ref in enumerate(refs)]
    write_text(out, "[\n" + ",\n".join(lines) + "\n]\n")
    return out


def main(arguments: Sequence[str]) -> int:
    """Convert each file that is named; exit status 2 for one that is refused."""
    if not arguments:
        sys.stderr.write("usage: python -m vlbench.data.refer_convert 'DIR/refs(unc).p' ...\n")
        return 2
    for name in arguments:
        try:
            sys.stdout.write(f"{convert(name)}\n")
        except UserError as error:
            sys.stderr.write(f"{error}\n")
            return 2
    return 0


def _refuse_programs(data: bytes, where: str) -> None:
    """Raise UserError at the first opcode that writes no plain data."""
    plain = set(_PLAIN.split())
    name = ""
    for count, (name, argument, place) in enumerate(_opcodes(data, where)):
        if name not in plain:
            named = f" {' '.join(str(argument).split())!r}" if isinstance(argument, str) else ""
            raise UserError(
                f"{where}: refused: at byte {place} it would run something ({name}{named}); "
                "a file of references is plain data, get it again from where it was published"
            )
        # A place far beyond what can have been stored would make the unpickler fill the memory with empty ones.
        if name in _STORES and int(argument) > count:
            raise UserError(f"{where}: refused: at byte {place} it stores at {argument}, which no writer does")
        if name == "STOP" and place + 1 != len(data):
            raise UserError(f"{where}: refused: something follows after its end, at byte {place + 1}")
    if name != "STOP":
        raise UserError(f"{where}: not a whole pickle: it ends at byte {len(data)} without saying so")


def _opcodes(data: bytes, where: str) -> Iterator[tuple[str, Any, int]]:
    """Name, argument and place of each opcode: ``pickletools.genops``, which of Python 2's texts takes ASCII alone."""
    by_code = {opcode.code: opcode for opcode in pickletools.opcodes}
    stream = io.BytesIO(data)
    while code := stream.read(1):
        place = stream.tell() - 1
        argument: Any = None
        opcode = by_code.get(code.decode("latin-1"))
        if opcode is None:
            raise UserError(f"{where}: not a whole pickle: byte {place} is {code!r}, which begins nothing")
        try:
            if opcode.name == "STRING":
                argument = stream.readline()
            elif opcode.arg is not None:
                argument = opcode.arg.reader(stream)
        except Exception as error:  # the readers have no error of their own
            raise UserError(f"{where}: not a whole pickle: at byte {place}: {error}") from None
        yield opcode.name, argument, place


def _reference(ref: Any, where: str) -> dict[str, Any]:
    """One reference with what the reader needs, and no more."""
    if not isinstance(ref, dict):
        raise UserError(f"{where}: expected a dict, got {type(ref).__name__}")
    found = {key: _typed(ref, key, kind, where) for key, kind in _REF.items()}
    where = f"{where} (ref_id {ref['ref_id']})"
    sentences = []
    for place, sentence in enumerate(found["sentences"]):
        if not isinstance(sentence, dict):
            raise UserError(f"{where}: sentence {place} is no dict")
        at = f"{where}, sentence {place}"
        sentences.append({"sent_id": _typed(sentence, "sent_id", int, at), "sent": _typed(sentence, "sent", str, at)})
    return found | {"sentences": sentences}


def _typed(item: dict[Any, Any], key: str, kind: type, where: str) -> Any:
    if key not in item:
        raise UserError(f"{where}: {key!r} is missing")
    if not isinstance(item[key], kind) or isinstance(item[key], bool):
        raise UserError(f"{where}: {key!r} is {type(item[key]).__name__}, expected {kind.__name__}")
    if kind is str and not item[key].isascii():
        try:
            item[key].encode("utf-8")
        except UnicodeEncodeError:
            raise UserError(f"{where}: {key!r} is no UTF-8: {item[key]!r}") from None
    return item[key]


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
