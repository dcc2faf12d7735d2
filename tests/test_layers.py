"""Who may import whom, read from the syntax trees: the architecture is held by a test, not by memory."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import vlbench

PACKAGE = Path(vlbench.__file__).parent

# Each package and the packages of vlbench that it may import, itself included.
ALLOWED = {
    "core": {"core"},
    "stats": {"core", "stats"},
    "store": {"core", "store"},
    "report": {"core", "stats", "store", "report"},
    "data": {"core", "data"},
    "models": {"core", "models"},
    "train": {"core", "data", "models", "train"},
    "recipes": {"core", "data", "models", "train", "recipes"},
    "finetune": {"core", "data", "models", "train", "finetune"},
    "adapters": {"core", "stats", "store", "data", "models", "finetune", "adapters"},
    "verbs": {
        "core",
        "stats",
        "store",
        "report",
        "data",
        "models",
        "train",
        "recipes",
        "finetune",
        "adapters",
        "verbs",
    },
}
HEAVY = {"torch", "torchvision", "timm", "open_clip", "transformers", "datasets", "sklearn"}
NEVER_TORCH = ("core", "stats", "store", "report")
CORE_ONLY = {"pydantic", "yaml"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if "_cards" not in path.parts)


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE.parent).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__")


def imports(tree: ast.AST, *, top_level_only: bool = False) -> list[tuple[str, list[str]]]:
    """(module, imported names) of every import that runs; those under ``if TYPE_CHECKING`` do not."""
    found: list[tuple[str, list[str]]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            found.append((node.module or "", [alias.name for alias in node.names]))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_module_imports_only_its_layers(path: Path) -> None:
    parts = name_of(path).split(".")
    if len(parts) < 2 or parts[1] in ("cli", "__main__"):
        return
    for module, _ in imports(ast.parse(path.read_text())):
        words = module.split(".")
        if words[0] == "vlbench" and len(words) > 1:
            assert words[1] != "cli", f"{name_of(path)} imports the command line"
            assert words[1] in ALLOWED[parts[1]], f"{name_of(path)} may not import {module}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_module_takes_no_private_name_of_another(path: Path) -> None:
    for module, names in imports(ast.parse(path.read_text())):
        if module.startswith("vlbench"):
            private = [name for name in names if name.startswith("_") and not name.startswith("__")]
            assert not private, f"{name_of(path)} imports {private} from {module}"


@pytest.mark.parametrize("kind", ["adapters", "recipes"])
def test_siblings_never_import_each_other(kind: str) -> None:
    shared = {"encoder", "base", "__init__", "common", "published"}  # shared ground, not a protocol or a paper
    siblings = {path.stem for path in (PACKAGE / kind).glob("*.py")} - shared
    for path in (PACKAGE / kind).glob("*.py"):
        for module, _ in imports(ast.parse(path.read_text())):
            words = module.split(".")
            if words[:2] == ["vlbench", kind] and len(words) > 2 and words[2] != path.stem:
                assert path.stem not in siblings or words[2] not in siblings, f"{path.stem} imports {module}"


@pytest.mark.parametrize("path", modules(), ids=name_of)
def test_light_layers_never_load_torch(path: Path) -> None:
    parts = name_of(path).split(".")
    if len(parts) < 2:
        return
    everywhere = {module.split(".")[0] for module, _ in imports(ast.parse(path.read_text()))}
    on_import = {module.split(".")[0] for module, _ in imports(ast.parse(path.read_text()), top_level_only=True)}
    if parts[1] in NEVER_TORCH:
        assert not everywhere & HEAVY, f"{name_of(path)} imports {everywhere & HEAVY}"
    if parts[1] in ("adapters", "cli", "__main__"):
        assert not on_import & HEAVY, f"{name_of(path)} imports {on_import & HEAVY} at its top"


def test_core_needs_only_pydantic_and_yaml() -> None:
    import sys

    for path in (PACKAGE / "core").glob("*.py"):
        for module, _ in imports(ast.parse(path.read_text())):
            top = module.split(".")[0]
            assert top in {"vlbench", "__future__", *sys.stdlib_module_names, *CORE_ONLY}, (
                f"{path.name} imports {module}"
            )


def test_cards_folders_hold_no_python() -> None:
    for folder in ("tasks", "reference_models"):
        assert not list((PACKAGE.parent / folder).rglob("*.py"))


def test_functions_stay_readable() -> None:
    """At most 80 lines a function and 450 a module: past that, a redesign is due."""
    for path in modules():
        text = path.read_text()
        assert text.count("\n") <= 450, f"{name_of(path)} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                assert length <= 80, f"{name_of(path)}:{node.name} has {length} lines"
