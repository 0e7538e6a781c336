"""The rules of the house: which way imports go, how long a file may be, and that shipped task files parse."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunegate.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "tunegate"
SOURCES = sorted(PACKAGE.rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").glob("**/*.y*ml"))
LONGEST_FILE = 500

# A module imports only from those before it, and from its own package.
ORDER = (
    "errors",
    "files",
    "yaml_file",
    "gate_rules",
    "config_problems",
    "config_sections",
    "config",
    "records",
    "kernels",
    "data",
    "model",
    "adapter",
    "engine",
    "plan",
    "evaluation",
    "gate",
    "registry",
    "export",
    "serve",
    "report",
    "pipeline",
    "cli",
)


def part_of(path: Path) -> str:
    """The part of the house a source file belongs to: ``data/read.py`` to data, ``__init__.py`` of tunegate to none."""
    name = path.relative_to(PACKAGE).parts[0]
    return "" if name in ("__init__.py", "__main__.py") else name.removesuffix(".py")


def imported_modules(tree: ast.AST, package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Every import of a file as ``(dotted name, line)``, those inside functions and relative ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def wrong_imports(path: Path, text: str) -> list[str]:
    own = part_of(path)
    package = ("tunegate", *path.relative_to(PACKAGE).parent.parts)
    found = []
    for name, line in imported_modules(ast.parse(text), package):
        names = name.split(".")
        if names[0] != "tunegate":
            if own in ("gate", "gate_rules") and names[0] in ("torch", "transformers"):
                found.append(f"{path.name}:{line}: gate imports {names[0]}")
            continue
        target = names[1] if len(names) > 1 else ""
        if target not in ORDER:
            if own and target not in ("", "__version__"):  # the package itself, for its version
                found.append(f"{path.name}:{line}: {name} is not in ORDER")
        elif own and target != own and ORDER.index(target) > ORDER.index(own):
            found.append(f"{path.name}:{line}: {own} imports {target}, which comes after it")
    return found


def test_every_module_has_its_place() -> None:
    assert {part_of(path) for path in SOURCES} - {""} <= set(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    assert wrong_imports(path, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("file", "text", "says"),
    [
        ("gate.py", "def f():\n    import torch.nn", "gate imports torch"),
        ("data/read.py", "from tunegate.engine import train", "data imports engine"),
        ("data/read.py", "from ..cli import main", "data imports cli"),
        ("data/read.py", "from .. import pipeline", "data imports pipeline"),
        ("errors.py", "import tunegate.files", "errors imports files"),
        ("engine/train.py", "from tunegate import helpers", "not in ORDER"),
        ("engine/train.py", "from . import schedule\nfrom tunegate.data.types import Example", ""),
        ("cli.py", "from tunegate import pipeline, __version__", ""),
    ],
)
def test_the_import_check_itself(file: str, text: str, says: str) -> None:
    found = wrong_imports(PACKAGE / file, text)
    assert says in found[0] if says else found == []


@pytest.mark.parametrize("module", ["gate", "config", "records"])
def test_plain_modules_load_no_torch(module: str) -> None:
    code = f"import sys, tunegate.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_files_stay_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_every_module_opens_with_its_mechanism(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body


def test_there_are_examples() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_shipped_tasks_parse(path: Path) -> None:
    config = load_config(path)
    files = [*config.task.data.train, *(config.task.data.valid or ()), *(config.task.data.test or ())]
    files += [config.task.task.json_schema] if config.task.task.json_schema else []
    assert all(config.path(file).is_file() for file in files)
