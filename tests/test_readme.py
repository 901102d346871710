"""The Python examples of README and of docs/cluster.md run as they stand."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from radixgen.model import prepare

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs/cluster.md"]
NEEDS_MORE = "path/to/model"
"""A model that nobody has here"""


def examples() -> list[str]:
    found = [re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL) for page in PAGES]
    return [example for page in found for example in page if NEEDS_MORE not in example]


EXAMPLES = examples()


@pytest.fixture(scope="module", autouse=True)
def one_model() -> Iterator[None]:
    """The engines of all examples borrow one SmolLM2, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load", cache(prepare.load))
        yield


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(example, "example", "exec"), {})
    assert capsys.readouterr().out


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == 11
