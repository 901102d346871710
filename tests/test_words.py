"""Names follow docs/glossary.md: public class names are unique, and vague words name neither classes nor functions."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import radixgen

ROOT = Path(radixgen.__file__).parent
MODULES = sorted(path for path in (*ROOT.rglob("*.py"), *ROOT.glob("kernels/*.py"), *ROOT.glob("scheduler/*.py")))
VAGUE = {"told", "asked", "found", "said", "shown", "one", "ones", "thing", "things", "way", "stuff"}
PARTICIPLES = {
    "allowed", "begun", "built", "captured", "cleared", "closed", "drawn", "followed", "found", "kept", "launched",
    "ran", "reading", "removed", "sampled", "seen", "served", "shown", "stored", "written",
}  # fmt: skip
"""What a class must not be called by itself: `SamplerOutput`, not `Drawn`."""

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def definitions(path: Path) -> Iterator[Definition]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, Definition):
            yield node


def words(name: str) -> list[str]:
    """The words of a name in snake case or camel case."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().strip("_").split("_")


def test_words() -> None:
    assert words("KVWriteDone") == ["kvwrite", "done"] and words("_SamplingStep") == ["sampling", "step"]
    assert words("only_one") == ["only", "one"] and words("__init__") == ["init"]


def test_public_class_names_are_unique() -> None:
    classes = [node for path in MODULES for node in definitions(path) if isinstance(node, ast.ClassDef)]
    counts = Counter(node.name for node in classes if not node.name.startswith("_"))
    assert len(counts) > 100
    assert [name for name, count in counts.items() if count > 1] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_not_vague(path: Path) -> None:
    for node in definitions(path):
        if node.name == "ModelNotFound":  # a public name, and the usual word
            continue
        assert VAGUE.isdisjoint(words(node.name)), f"{path.name}:{node.lineno}: {node.name}"
        if isinstance(node, ast.ClassDef):
            assert node.name.lower().strip("_") not in PARTICIPLES, f"{path.name}:{node.lineno}: {node.name}"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_of_a_size_to_read(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 500
