"""What is built from a checkout, or from a copy that lost its links, is whole: it installs, serves and tests itself."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from sizes import nightly

import radixgen

ROOT = Path(__file__).parent.parent
LINKS = {ROOT / "radixgen" / name for name in ("kernels", "scheduler")}
COPIED = ("radixgen", "kernels", "scheduler", "tests", "bench", "docs", "examples")
NOT_COPIED = shutil.ignore_patterns("*.egg-info", "__pycache__", "results")
NOT_COMPILED = {"NUMBA_DISABLE_JIT": "1"}
"""Numba's cache belongs to a path: compiling for a new one takes longer than all the rest."""
BUILD = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_wheel(to); b.build_sdist(to)"


def copy_of(source: Path, target: Path, *, links: bool) -> Path:
    """A copy whose symbolic links stay links, or are text files as in some archives and on some file systems."""
    target.mkdir()
    for name in COPIED:
        shutil.copytree(source / name, target / name, symlinks=True, ignore=NOT_COPIED)
    for path in source.iterdir():
        if path.is_file():
            shutil.copy(path, target)
    for link in [] if links else [target / link.relative_to(ROOT) for link in LINKS]:
        link.unlink(missing_ok=True)
        link.write_text(f"../{link.name}")
    return target


def build(source: Path, target: Path) -> tuple[Path, Path]:
    """Build in place. Returns the wheel and the source distribution."""
    target.mkdir()
    subprocess.run([sys.executable, "-c", BUILD, target], cwd=source, check=True, capture_output=True)
    (wheel,), (sdist,) = target.glob("*.whl"), target.glob("*.tar.gz")
    return wheel, sdist


def unpack(sdist: Path, target: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(target, filter="data")
    (root,) = target.iterdir()
    return root


def files_of(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run with nothing of this checkout on the path."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("checkout")
    return build(copy_of(ROOT, folder / "copy", links=all(link.is_symlink() for link in LINKS)), folder / "dist")


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that holds the wheel, and beside it what this environment holds but radixgen."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", built[0], cwd=folder)
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip()
    # A path in a .pth file is not searched for .pth files, so this environment's own radixgen, a link, is not seen.
    (Path(site) / "beside.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return python


def sources(*folders: str) -> set[Path]:
    """Files of folders of this checkout, but for what Python and the links add."""
    paths = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    return {
        path.relative_to(ROOT)
        for path in paths
        if "__pycache__" not in path.parts and not {path, *path.parents} & LINKS
    }


def test_a_wheel_holds_every_source(built: tuple[Path, Path]) -> None:
    own = {str(path) for path in sources("radixgen")}
    beside = {f"radixgen/{path}" for path in sources("kernels", "scheduler")}
    assert files_of(built[0]) == own | beside
    assert {"radixgen/kernels/triton_kernels.py", "radixgen/scheduler/planner.py"} <= beside


@pytest.mark.parametrize("origin", ["copy without links", "source distribution"])
def test_no_link_is_needed(origin: str, built: tuple[Path, Path], tmp_path: Path) -> None:
    if origin == "source distribution":
        root = unpack(built[1], tmp_path / "source")
    else:
        root = copy_of(ROOT, tmp_path / "source", links=False)
    wheel, sdist = build(root, tmp_path / "dist")
    assert files_of(wheel) == files_of(built[0])
    tested = {path for path in sources("tests", "bench", "docs", "examples") if "results" not in path.parts}
    tested |= {
        Path(name) for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", "Makefile", "mkdocs.yml")
    }
    again = unpack(sdist, tmp_path / "again")
    assert all((again / path).is_file() for path in tested)


@pytest.mark.slow
def test_an_installed_wheel_serves_a_request(installed: Path, tmp_path: Path) -> None:
    out = run(
        installed, "-m", "radixgen", "generate", "--max-tokens", "2", "The capital of France is",
        cwd=tmp_path, **NOT_COMPILED,
    )  # fmt: skip
    assert '"text": " Paris' in out
    where = run(installed, "-c", "import radixgen; print(radixgen.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent.parent)


def test_a_source_distribution_tests_itself(installed: Path, built: tuple[Path, Path], tmp_path: Path) -> None:
    root = unpack(built[1], tmp_path)
    run("make", "links", cwd=root)
    some = ["tests/test_pool.py", "tests/test_tree.py"]
    assert "passed" in run(installed, "-m", "pytest", "-p", "no:cacheprovider", *some, cwd=root, **NOT_COMPILED)


@nightly
def test_an_empty_environment_installs_what_it_needs(built: tuple[Path, Path], tmp_path: Path) -> None:
    run(sys.executable, "-m", "venv", tmp_path / "empty", cwd=tmp_path)
    python = tmp_path / "empty" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", built[0], cwd=tmp_path)
    out = run(python, "-m", "radixgen", "generate", "--max-tokens", "2", "The capital of France is", cwd=tmp_path)
    assert '"text": " Paris' in out


def test_the_folders_of_a_checkout_shadow_no_package(tmp_path: Path) -> None:
    """`kernels` is a Hugging Face package that transformers looks for."""
    site = tmp_path / "site"
    for name in ("kernels", "scheduler"):
        (site / name).mkdir(parents=True)
        (site / name / "__init__.py").write_text("theirs = True\n")
    code = "import kernels, scheduler; assert kernels.theirs and scheduler.theirs"
    run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=f"{ROOT}{os.pathsep}{site}")


def test_pictures_and_links_of_the_readme_work_anywhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)]+)\)", readme)
    assert targets and all(target.startswith("https://") for target in targets)
    own = r"https://(?:raw\.githubusercontent\.com|github\.com)/radixgen/radixgen/(?:blob/)?main/(.+)"
    paths = [match[1] for target in targets if (match := re.fullmatch(own, target))]
    assert {"docs/demo.svg", "docs/http.md"} <= set(paths) and all((ROOT / path).is_file() for path in paths)


def test_the_dockerfile_installs_the_torch_that_is_supported() -> None:
    (torch,) = re.findall(r'"torch([^"]+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert f'"torch{torch}"' in (ROOT / "Dockerfile").read_text(encoding="utf-8")


def test_the_dockerfile_has_no_faults() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    if not hadolint.exists():
        pytest.skip("needs hadolint, whose wheel is made for Linux on x86-64")
    run(hadolint, "Dockerfile", cwd=ROOT)


@nightly
def test_the_dockerfile_builds(tmp_path: Path) -> None:
    if (
        shutil.which("docker") is None
        or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs a running Docker engine")
    run("docker", "build", "--tag", "radixgen-test", ROOT, cwd=tmp_path)
    assert "serve" in run("docker", "run", "--rm", "radixgen-test", "--help", cwd=tmp_path)


def test_the_version_stands_in_the_changelog() -> None:
    assert f"## {radixgen.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_lowest_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["structured"], *extras["serve"]]
    lowest = [re.sub(r">=([\d.]+).*", r"==\1", line) for line in wanted if not line.startswith("torch>")]
    lines = (ROOT / "tests" / "lowest.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == sorted(lowest)
