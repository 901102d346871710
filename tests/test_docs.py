"""Code blocks of README and docs/ run as they stand, links lead somewhere, and commands have the options given.

A Python block after `<!-- not run: REASON -->` is only compiled. Blocks for a server at port 8000 get one with SmolLM2.
"""

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import families
import httpx
import pytest
import typer
from served import over_socket
from typer.testing import CliRunner

from radixgen import Engine
from radixgen.cli import app
from radixgen.model import prepare

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
SERVER = "http://127.0.0.1:8000"
RUN = {"generate", "tree", "explain", "doctor"}
"""Commands that are run; of others only the options are checked."""


class Block(NamedTuple):
    page: Path
    line: int
    language: str
    text: str
    skipped: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in re.finditer(r"(<!-- not run: .+ -->\n)?^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, match.start(2)) + 1
            found.append(Block(page, line, match[2], match[3], match[1] is not None))
    return [block for block in found if block.language in languages]


PYTHON = [block for block in blocks("python") if not block.skipped]
CONSOLE = blocks("console", "bash")


@pytest.fixture(scope="module", autouse=True)
def one_model() -> Iterator[None]:
    """The engines of all blocks borrow one SmolLM2, one after the other."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "load", cache(prepare.load))
        yield


@pytest.fixture
def server() -> Iterator[str]:
    with over_socket(Engine("smollm2", kv_tokens=4096), names=["smollm2"]) as served:
        yield served.url


def commands(block: Block) -> list[list[str]]:
    """What is typed: of a console the lines behind `$`, continued lines as one."""
    lines = re.sub(r"\\\n\s*", "", block.text).splitlines()
    if block.language == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    typed = [part for line in lines for part in line.split(" && ") if part.strip()]
    return [words for part in typed if (words := shlex.split(part.removesuffix(" &"), comments=True))]


@pytest.mark.slow
@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_runs(block: Block, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> None:
    text = block.text
    if SERVER in text:
        text = text.replace(SERVER, request.getfixturevalue("server"))
    exec(compile(text, str(block), "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out


@pytest.mark.parametrize("block", [block for block in blocks("python") if block.skipped], ids=str)
def test_python_that_needs_more_compiles(block: Block) -> None:
    compile(block.text, str(block), "exec")


@pytest.mark.parametrize("block", CONSOLE, ids=str)
def test_commands_are_right(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for program, *arguments in commands(block):
        if program == "radixgen":
            check_radixgen(arguments)
        elif program == "printf":
            *printed, _, file = arguments
            subprocess.run(["bash", "-c", f"{shlex.join([program, *printed])} > {file}"], check=True)
        elif program == "make":
            assert {one for one in arguments if "=" not in one} <= targets, arguments
        elif program == "python" and arguments[0] != "-m":
            assert (ROOT / arguments[0]).is_file(), arguments


def check_radixgen(arguments: list[str]) -> None:
    command, *options = arguments
    if command in RUN and not any("/" in one for one in options):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0 and result.output, result.output
    elif "dynamo" not in options:
        group = typer.main.get_command(app)
        group.commands[command].make_context(command, options)  # type: ignore[attr-defined]


def test_requests_by_curl_are_answered(server: str) -> None:
    typed = [words for block in CONSOLE for words in commands(block) if words[0] == "curl"]
    assert typed
    for words in typed:
        path = re.sub(r"^(http://)?[\w.]+:8000", "", words[1])
        answer = httpx.post(server + path, json=json.loads(words[words.index("-d") + 1]), timeout=60)
        assert answer.status_code == 200, answer.text


def test_json_blocks_are_json() -> None:
    for block in blocks("json"):
        json.loads(block.text)


def prose(page: Path) -> str:
    """The page without code."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace("](", "] ("), text)


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    titles = [match[1].replace("`", "") for match in re.finditer(r"^#+ (.+)$", prose(page), re.MULTILINE)]
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not target.startswith(("http://", "https://")):
            path, _, anchor = target.partition("#")
            goal = (page.parent / path).resolve() if path else page
            assert goal.is_file(), f"{target} leads nowhere"
            assert not anchor or anchor in anchors(goal), f"{target} names no heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page: Path) -> None:
    """Of a module's name in the text, which is relative to the repository or to the package."""
    for name in re.findall(r"`([\w./]+/\w+\.(?:py|md|json|txt|toml))`", page.read_text(encoding="utf-8")):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "radixgen")), f"{name} does not exist"


def test_every_page_is_in_the_site() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w/]+\.md)$", config, re.MULTILINE))
    assert listed == {str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS)}


def test_the_site_builds(tmp_path: Path) -> None:
    """With the extra `docs` only, as `make docs` does it."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "SamplingParams" in (tmp_path / "site/api/parameters/index.html").read_text(encoding="utf-8")


def test_the_reference_names_what_there_is() -> None:
    names = [name for page in PAGES for name in re.findall(r"^::: ([\w.]+)$", page.read_text("utf-8"), re.MULTILINE)]
    assert len(names) == len(set(names)) > 30
    for name in names:
        module, _, member = name.rpartition(".")
        assert getattr(import_module(module), member).__doc__, name


def test_the_table_of_models_names_every_tested_family() -> None:
    table = (DOCS / "models.md").read_text(encoding="utf-8")
    assert all(f"`{family.model_type}`" in table for family in families._FAMILIES.values())


def test_the_readme_is_short_and_begins_with_a_run() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    assert "$ make demo" in lines[:30] and any("What sharing saved" in line for line in lines[:30])
