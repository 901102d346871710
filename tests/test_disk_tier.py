"""KV on disk: a later engine finds it, damage is found out, and no token changes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from oracle import StampModel, run_late
from test_exactness import greedy, oracle_of, prompts
from test_host_tier import texts

from radixgen import Engine, InvalidRequest, Limits
from radixgen.cache import KVFiles
from radixgen.cache import kv_files as kv_files_module
from radixgen.cache.kv_files import DamagedFile, folder_secret
from radixgen.serve.http.auth import Access, Keys

CHUNK, RECORD = 4, 24
NAME = "0123456789" * 4


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("radixgen.model.kv_dir.CHUNK_TOKENS", CHUNK)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "kv"


def records_of(name: str, size: tuple[int, int] = (CHUNK, RECORD)) -> np.ndarray:
    return np.random.default_rng(int(name, 16) % 2**60).integers(0, 256, size, np.uint8)


# -- files ------------------------------------------------------------------------------------------------


def test_files_are_safetensors_of_the_owner_alone(folder: Path) -> None:
    from safetensors import safe_open

    files = KVFiles(folder, RECORD, CHUNK)
    files.write(NAME, records_of(NAME))
    (path,) = folder.iterdir()
    assert path.name == f"{NAME}.safetensors"
    assert path.stat().st_mode & 0o777 == 0o600 and folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_size == files.file_bytes
    with safe_open(path, "np") as tensors:
        assert np.array_equal(tensors.get_tensor("kv"), records_of(NAME))
    assert np.array_equal(files.read(NAME), records_of(NAME))
    assert [(file.name, file.num_bytes) for file in files.files()] == [(NAME, files.file_bytes)]
    files.close()


@pytest.mark.parametrize("size", [(4, 24), (1, 1), (3, 7), (64, 1001)])
def test_every_damaged_byte_is_found_out(folder: Path, size: tuple[int, int]) -> None:
    files = KVFiles(folder, size[1], size[0])
    files.write(NAME, records_of(NAME, size))
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    step = max(len(whole) // 500, 1)
    for position in range(0, len(whole), step):
        flipped = bytearray(whole)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        with pytest.raises(DamagedFile):
            files.read(NAME)
    for damaged in [b"", whole[:7], whole + b"\0", bytes(len(whole)), *(whole[:n] for n in range(0, len(whole), step))]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedFile):
            files.read(NAME)
    path.write_bytes(whole)
    assert np.array_equal(files.read(NAME), records_of(NAME, size))
    files.close()


def test_a_file_of_another_name_or_shape_is_refused(folder: Path) -> None:
    other = NAME[::-1]
    files = KVFiles(folder, RECORD, CHUNK)
    files.write(NAME, records_of(NAME))
    (path,) = folder.iterdir()
    path.rename(folder / f"{other}.safetensors")
    with pytest.raises(DamagedFile):
        files.read(other)
    with pytest.raises(FileNotFoundError):
        files.read(NAME)
    files.write(NAME, records_of(NAME))
    files.close()
    files = KVFiles(folder, RECORD * 2, CHUNK // 2)
    with pytest.raises(DamagedFile):
        files.read(NAME)
    files.close()


plain_replace = os.replace


class Killed(BaseException):
    """The process ends here."""


class FaultyOS:
    """The module `os`, which fails at the given call that changes the disk; a write writes `written` bytes before."""

    def __init__(self, fail_at: int, error: BaseException, written: int) -> None:
        self.fail_at, self.error, self.written, self.calls = fail_at, error, written, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        self._count()
        return os.open(path, flags, mode)

    def write(self, descriptor: int, content: memoryview) -> int:
        self.calls += 1
        if self.calls == self.fail_at:
            os.write(descriptor, content[: self.written])
            raise self.error
        return os.write(descriptor, content[: self.written or len(content)])

    def close(self, descriptor: int) -> None:
        os.close(descriptor)
        self._count()

    def replace(self, path: Path, target: Path) -> None:
        self._count()
        plain_replace(path, target)

    def _count(self) -> None:
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error


@pytest.mark.parametrize("error", [Killed(), OSError(28, "No space left on device")], ids=["killed", "full"])
@pytest.mark.parametrize("written", [0, 1, 50])
def test_a_write_that_ends_at_any_step(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, written: int
) -> None:
    """It leaves nothing, or the whole file; what was there before stays."""
    other, fail_at, finished = NAME[::-1], 0, False
    while not finished:
        fail_at += 1
        files = KVFiles(folder, RECORD, CHUNK)
        files.write(other, records_of(other))
        with monkeypatch.context() as patch:
            faulty = FaultyOS(fail_at, error, written)
            patch.setattr(kv_files_module, "os", faulty)
            patch.setattr(os, "replace", faulty.replace)
            try:
                files.write(NAME, records_of(NAME))
            except type(error):
                pass
            else:
                finished = True
        files.close()
        files = KVFiles(folder, RECORD, CHUNK)
        names = {file.name for file in files.files()}
        assert names == ({NAME, other} if finished else {other})
        assert len(list(folder.iterdir())) == len(names)
        for name in names:
            assert np.array_equal(files.read(name), records_of(name))
        files.close()
    assert fail_at > 5


WRITER = """
import sys
from pathlib import Path
import numpy as np
from radixgen.cache import KVFiles
files = KVFiles(Path(sys.argv[1]), 100_000, 4)
for number in range(10**6):
    name = f"{number % 50:040x}"
    files.write(name, np.random.default_rng(int(name, 16)).integers(0, 256, (4, 100_000), np.uint8))
    print(number, flush=True)
"""


@pytest.mark.slow
def test_kill_9_leaves_whole_files(folder: Path) -> None:
    for attempt in range(4):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"0\n"
            with pytest.raises(InvalidRequest, match="in use by another engine"):
                KVFiles(folder, 100_000, CHUNK)
            time.sleep(0.05 + 0.03 * attempt)
            process.send_signal(signal.SIGKILL)
        files = KVFiles(folder, 100_000, CHUNK)
        found = files.files()
        assert found and len(list(folder.iterdir())) == len(found)
        for file in found:
            assert np.array_equal(files.read(file.name), records_of(file.name, (CHUNK, 100_000)))
        files.close()


# -- restarts, by the oracle ------------------------------------------------------------------------------


class Stamped:
    """An engine over the oracle's model with a disk tier, whose threads run in the engine's own."""

    def __init__(
        self, folder: Path, *, slots: int = 64, host_slots: int = 400, weights: int = 0, delay: int = 0, **options: Any
    ) -> None:
        self.model = StampModel(3, 64)
        self.model.fingerprint = bytes([weights]) * 32
        self.engine = Engine(
            self.model,
            kv_tokens=slots,
            host_kv_tokens=host_slots,
            kv_dir=folder,
            max_step_tokens=32,
            debug=True,
            **options,
        )
        core = self.engine._core
        assert core.host is not None and core.host._disk is not None
        self.host, self.disk = core.host, core.host._disk
        self.host.fetches.min_fetch = 1
        run_late(self.disk)
        self.disk._reader.delay = self.disk._writer.delay = delay

    def run(self, prompts: list[list[int]], tokens: int = 4, namespace: str = "") -> list[int]:
        """Serve requests together, with every invariant checked after each step. Returns their cached tokens."""
        names = [self.engine.submit(prompt, greedy(tokens), namespace=namespace) for prompt in prompts]
        cached = {}
        while self.engine.has_unfinished:
            for output in self.engine.step():
                cached[output.request_id] = output.num_cached_tokens
            self.engine.check()
        return [cached[name] for name in names]


def restarted(served: Stamped, folder: Path, **options: Any) -> Stamped:
    served.engine.close()
    return Stamped(folder, **options)


@pytest.mark.parametrize("delay", [0, 1, 5])
def test_a_restarted_engine_finds_its_cache(folder: Path, delay: int) -> None:
    served = Stamped(folder, slots=200, delay=delay)
    prompts = texts(3)
    served.run(prompts)
    served = restarted(served, folder, slots=200, delay=delay)
    assert served.run(prompts) == [28, 28, 28]
    stats = served.engine.stats()
    assert stats.disk_read_tokens == 84 and stats.computed_rows < 20 and not stats.disk_failed_files
    assert served.run(prompts[:1]) == [30]
    served.engine.close()


def test_a_prefix_that_the_device_has_is_extended_from_disk(folder: Path) -> None:
    served = Stamped(folder)
    (prompt,) = texts(1, 40)
    served.run([prompt])
    served = restarted(served, folder)
    served.run([[*prompt[:10], 1 - prompt[10] % 2]], tokens=1)
    assert served.run([prompt]) == [40]
    assert served.engine.stats().disk_read_tokens == 8 + 32
    served.engine.close()


def test_other_weights_and_namespaces_find_nothing(folder: Path) -> None:
    served = Stamped(folder)
    (prompt,) = texts(1)
    served.run([prompt], namespace="one")
    for weights, namespace, cached in ((1, "one", 0), (0, "", 0), (0, "other", 0), (0, "one", 28)):
        served = restarted(served, folder, weights=weights)
        assert served.run([prompt], namespace=namespace) == [cached]
    served.engine.close()


def test_private_sequences_are_never_written(folder: Path) -> None:
    served = Stamped(folder, share=False)
    served.run(texts(3))
    served.run(texts(3))
    served.engine.close()
    assert not list(folder.iterdir())


def test_requests_with_one_prefix_share_a_read(folder: Path) -> None:
    served = Stamped(folder, slots=100)
    (prefix,) = texts(1, 40)
    served.run([prefix])
    served = restarted(served, folder, slots=100, delay=3)
    assert min(served.run([[*prefix, token] for token in (0, 1, 2, 0)])) >= 40
    assert served.engine.stats().disk_read_tokens == 40
    served.engine.close()


def test_a_request_that_leaves_while_it_is_read_locks_nothing(folder: Path) -> None:
    served = Stamped(folder)
    (prompt,) = texts(1)
    served.run([prompt])
    served = restarted(served, folder, delay=3)
    name = served.engine.submit(prompt, greedy(4))
    served.engine._core.scheduler.schedule()
    assert served.host.fetching
    served.engine.cancel(name)
    served.engine.check()
    served.run(texts(2, seed=3))
    assert served.engine.reset_prefix_cache() > 0
    assert not served.host.fetching and not list(served.host.locks())
    assert served.engine._core.tree.pool.free == 64 and not served.host.tree.pool.used
    served.engine.close()


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_a_bad_file_is_deleted_and_computed_again(folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    served = Stamped(folder)
    (prompt,) = texts(1)
    served.run([prompt])
    served.engine.close()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    chunks = served.disk._chunks(np.array(prompt, np.int32), "")
    for chunk in chunks:
        served = Stamped(folder, delay=2)
        path = folder / f"{chunk.name}.safetensors"
        content = path.read_bytes()
        if damage == "delete":
            path.unlink()
        else:
            path.write_bytes(content[:-1] if damage == "truncate" else content[:-1] + bytes([content[-1] ^ 1]))
        assert served.run([prompt]) == [chunk.start]
        assert served.engine.stats().disk_failed_files == 1
        assert served.run([prompt]) == [30]
        served.engine.close()
        assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert sum("is computed again" in record.message for record in caplog.records) == len(chunks) == 7


def test_a_full_disk_is_logged_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = Stamped(folder)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(KVFiles, "write", full)
    for prompt in texts(3):
        served.run([prompt])
    served.engine.reset_prefix_cache()
    stats = served.engine.stats()
    assert stats.kv_bytes_disk_used == 0 and stats.disk_skipped_tokens == 3 * 32 and not stats.disk_written_tokens
    served.engine.close()
    assert sum("could not be written" in record.message for record in caplog.records) == 1


def test_the_least_recently_used_files_go_first(folder: Path) -> None:
    prompts = texts(3)
    served = Stamped(folder)
    size = served.disk._files.file_bytes
    served = restarted(served, folder, kv_dir_bytes=17 * size + 5)
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        served.run([prompt])
    stats = served.engine.stats()
    assert stats.disk_evicted_tokens > 0
    served = restarted(served, folder, kv_dir_bytes=17 * size)
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 17 * size
    assert served.run([prompts[0]]) == [28] and served.run([prompts[2]]) == [28] and served.run([prompts[1]]) == [4]
    served = restarted(served, folder, kv_dir_bytes=3 * size)
    assert len(list(folder.iterdir())) <= 3
    served.run(prompts)
    served.engine.close()
    assert len(list(folder.iterdir())) <= 3


def test_a_prefix_is_kept_longer_than_what_follows_it(folder: Path) -> None:
    """Also by a later engine, which knows only the times of the files."""
    (prompt,) = texts(1, 40)
    served = Stamped(folder)
    size = served.disk._files.file_bytes
    served.run([prompt])
    served = restarted(served, folder, kv_dir_bytes=5 * size)
    assert served.run([prompt]) == [20]
    served.engine.close()


def test_reading_that_takes_longer_than_computing_is_not_done(folder: Path) -> None:
    served = Stamped(folder)
    (prompt,) = texts(1)
    served.run([prompt])
    served = restarted(served, folder)
    costs = served.host.fetches.costs
    costs.seconds_per_computed, costs.seconds_per_read = 1e-3, 2e-3
    assert served.run([prompt]) == [0]
    assert served.engine.stats().disk_read_tokens == 0
    served.engine.close()


def test_what_the_host_has_is_fetched_even_if_reading_the_rest_takes_longer(folder: Path) -> None:
    """Pins: a slow disk made the engine compute also what host memory had."""
    served = Stamped(folder)
    (prompt,) = texts(1)
    served.run([prompt])
    served.host.saves.complete()
    served.host.saves.complete_writes()
    served.engine._core.tree.reset()
    served.host.tree.evict(served.host.tree.evictable_tokens - 16)
    costs = served.host.fetches.costs
    costs.seconds_per_computed, costs.seconds_per_read, costs.seconds_per_fetched = 1e-3, 2e-3, 1e-4
    assert served.run([prompt]) == [16]
    stats = served.engine.stats()
    assert stats.host_fetched_tokens == 16 and stats.host_recomputed_tokens == 12 and not stats.disk_read_tokens
    served.engine.close()


@pytest.mark.parametrize("delay", [0, 2])
@pytest.mark.parametrize("per_read", [0.5, 2.0], ids=["fast disk", "slow disk"])
def test_each_part_of_a_prefix_is_fetched_or_computed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, per_read: float, delay: int
) -> None:
    """Random histories in a small host: by the oracle, no row reads what is not there."""
    served, draw = Stamped(folder, slots=100, host_slots=90, delay=delay), random.Random(0)
    costs, ends = served.host.fetches.costs, []
    best_end = costs.best_end

    def recorded(first: int, in_host: int, stop: int, **queues: int) -> int:
        costs.seconds_per_computed, costs.seconds_per_fetched, costs.seconds_per_read = 1.0, 0.1, per_read
        ends.append((first, best_end(first, in_host, stop, **queues), stop))
        return ends[-1][1]

    monkeypatch.setattr(costs, "best_end", recorded)
    bases = texts(3, 40)
    for _ in range(40):
        prompts = [draw.choice(bases)[: draw.randrange(10, 40)] + [2] for _ in range(2)]
        served.run(prompts)
        served.host.saves.complete()
        served.engine._core.tree.evict(draw.randrange(100))
        served.host.tree.evict(draw.randrange(40))
        served.engine.check()
    parts = sum(first < end < stop for first, end, stop in ends)
    read = served.engine.stats().disk_read_tokens
    assert read if per_read < 1 else parts and not read, (read, parts)
    served.engine.close()


def test_a_host_that_is_small_reads_a_part(folder: Path) -> None:
    served = Stamped(folder)
    (prompt,) = texts(1, 40)
    served.run([prompt])
    served = restarted(served, folder, host_slots=22)
    assert served.run([prompt]) == [20]
    served.engine.close()


def test_reset_deletes_the_files(folder: Path) -> None:
    served = Stamped(folder, delay=2)
    served.run(texts(3))
    assert served.engine.reset_prefix_cache() > 2 * 90
    served.engine.close()
    assert not list(folder.iterdir())


# -- whole engines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("kv_dtype", ["auto", "int8"])
def test_tokens_equal_those_of_transformers(family: str, folder: Path, kv_dtype: str) -> None:
    """With real threads; 8-bit KV is compared with itself."""
    options = {"kv_tokens": 200, "kv_dir": folder, "kv_dtype": kv_dtype, "debug": True}
    answers = []
    with oracle_of(family) as oracle:
        for _ in range(3):
            with Engine(families.build(family), **options) as engine:
                engine._core.host.fetches.min_fetch = 1
                outputs = [engine.generate(one, greedy(16))[0].outputs[0].token_ids for one in prompts(families.VOCAB)]
                answers.append(outputs)
                engine.check()
                read = engine.stats().disk_read_tokens
                if kv_dtype == "auto":
                    for prompt, output in zip(prompts(families.VOCAB), outputs, strict=True):
                        oracle.expect(engine, prompt, output, 16)
    assert read > 50 and answers[0] == answers[1] == answers[2]


def test_a_checkpoint_that_was_overwritten_in_place_finds_nothing(tmp_path: Path, folder: Path) -> None:
    """Same path, same size, same times, one weight changed."""
    checkpoint = tmp_path / "checkpoint"
    prompt = list(range(3, 43))

    def serve() -> tuple[int, list[int]]:
        with Engine(checkpoint, kv_tokens=200, kv_dir=folder, device="cpu") as engine:
            engine._core.host.fetches.min_fetch = 1
            (output,) = engine.generate(prompt, greedy(8))
            return engine.stats().disk_read_tokens, output.outputs[0].token_ids

    network = families.build("llama")
    weight = network.model.layers[0].self_attn.k_proj.weight
    original = weight.detach().clone()
    network.save_pretrained(checkpoint)
    assert serve()[0] == 0
    read, before = serve()
    assert read == 40
    path = checkpoint / "model.safetensors"
    status = path.stat()
    with torch.no_grad():
        weight[0, 0] += 0.5
    network.save_pretrained(checkpoint)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert serve()[0] == 0
    assert serve()[0] == 40
    with torch.no_grad():
        weight.copy_(original)
    network.save_pretrained(checkpoint)
    assert serve() == (40, before)


def test_namespaces_of_api_keys_are_the_same_after_a_restart(folder: Path) -> None:
    folder.mkdir(0o700)
    secret = folder_secret(folder)
    path = folder / "secret"
    assert folder_secret(folder) == secret == path.read_bytes() and path.stat().st_mode & 0o777 == 0o600
    names = set()
    for _ in range(2):
        keys = Keys(["one", "two"], secret=secret)
        names |= {keys.namespace(keys.check(Access.CALLER, "", key), None, Limits()) for key in ("one", "two")}
    assert len(names) == 2
    path.write_bytes(secret[:-1])
    assert len(folder_secret(folder)) == 32


# -- bad input --------------------------------------------------------------------------------------------


def test_bad_folders(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    shared = tmp_path / "shared"
    shared.mkdir(mode=0o755)
    for folder, reason in (
        (file, "must be a folder to write to: File exists"),
        (file / "below", "must be a folder to write to: Not a directory"),
        (Path("/proc/kv"), "must be a folder to write to"),
        (shared, "chmod 700"),
        ("", "must be the path of a folder"),
        (3, "must be the path of a folder"),
    ):
        with pytest.raises(InvalidRequest, match=reason) as error:
            Engine(StampModel(), kv_tokens=64, kv_dir=folder)
        assert "kv_dir" in str(error.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"kv_dir_bytes": 0}, "kv_dir_bytes=0: must be"),
        ({"kv_dir_bytes": 100}, "kv_dir_bytes=100: must be at least .* a file of 4 tokens"),
        ({"kv_dir_bytes": True}, "kv_dir_bytes"),
        ({"kv_dir_bytes": 1 << 20, "kv_dir": None}, "goes with kv_dir"),
        ({"host_kv_tokens": 3}, "needs a host tier of at least 4 tokens, not 3"),
    ],
)
def test_bad_sizes(folder: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        Engine(StampModel(), kv_tokens=64, **({"kv_dir": folder} | options))
    Engine(StampModel(), kv_tokens=64, kv_dir=folder).close()


def test_a_folder_belongs_to_one_engine(folder: Path) -> None:
    with (
        Engine(StampModel(), kv_tokens=64, kv_dir=folder),
        pytest.raises(InvalidRequest, match="in use by another engine"),
    ):
        Engine(StampModel(), kv_tokens=64, kv_dir=folder)
    Engine(StampModel(), kv_tokens=64, kv_dir=folder).close()
