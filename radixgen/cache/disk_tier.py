"""KV on disk: an index of chunk files in memory, and threads that read and write them.

A chunk's name is a hash of its namespace, of all tokens up to its end, and of a fingerprint of everything else that KV
depends on. So a name never stands for other content, nothing is ever overwritten, and what is on disk can be used
after a restart. Besides KV, only hashes are written.

Index and names belong to the engine's thread. Two other threads access the files: one reads, one writes.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from radixgen.cache.kv_files import DamagedFile, KVFiles
from radixgen.cache.tokens import TokenArray, exact_len

logger = logging.getLogger(__name__)

_DIGEST_SIZE = 20
_WRITING_SHARE = 4
"""At most this fraction (1/n) of the host's slots, or one path, waits to be written and cannot be evicted meanwhile."""
_TOUCH_SECONDS = 60.0
"""A file's time of use is written at most this often."""


@runtime_checkable
class HostRecords(Protocol):
    """KV in host memory, as one record per token.

    Slots are int64 `[tokens]`, and records uint8 `[tokens, record_bytes]`, contiguous. Threads may read and write at
    the same time if their slots differ.
    """

    num_slots: int
    record_bytes: int

    def read_records(self, host_slots: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a copy of the records in these slots."""

    def write_records(self, host_slots: NDArray[np.int64], records: NDArray[np.uint8]) -> None:
        """Copy records to these slots."""


@dataclass(frozen=True, slots=True)
class DiskChunk:
    """A chunk's file, and the position of its first token."""

    name: str
    start: int


@dataclass(eq=False, slots=True)
class _IndexEntry:
    """A file in the index."""

    num_bytes: int
    touched: float
    """When its time of use was last written to disk, in seconds since 1970"""


class _ReadFailed(Exception):
    """A file could not be read."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class DiskJob:
    """A read or a write of `chunks` in another thread."""

    def __init__(self, chunks: Sequence[DiskChunk], future: "Future[float]") -> None:
        self.chunks = chunks
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self, seconds: float | None = None) -> bool:
        """Block until the work is done, for at most `seconds`. Returns whether it is done."""
        with suppress(TimeoutError):
            self._future.exception(seconds)
        return self._future.done()

    @property
    def error(self) -> BaseException | None:
        """Why the work failed, once it is done."""
        return self._future.exception()

    @property
    def seconds(self) -> float:
        """How long the work took, once it has succeeded."""
        return self._future.result()


class DiskTier:
    """Finds, reads and writes chunks of KV in a bounded folder; the least recently used are deleted first."""

    def __init__(self, files: KVFiles, records: HostRecords, fingerprint: bytes, max_bytes: int) -> None:
        """`fingerprint`: hash of what KV depends on besides namespace and tokens, at most 64 bytes. `max_bytes`: bound
        on the size of all files; the oldest beyond it are deleted. `close` closes `files`.
        """
        self.chunk_tokens = files.chunk_tokens
        self.read_tokens = self.written_tokens = self.evicted_tokens = self.skipped_tokens = 0
        self.failed_files = 0
        self.read_seconds = 0.0
        self._files = files
        self._records = records
        self._fingerprint = fingerprint
        self._max_bytes = max_bytes
        self._max_files = max_bytes // files.file_bytes
        self._max_writing = min(max(records.num_slots // (_WRITING_SHARE * files.chunk_tokens), 1), self._max_files)
        self._index: dict[str, _IndexEntry] = {}
        """The files, least recently used first."""
        self._writing: set[str] = set()
        self._bytes = 0
        """Size of the files in the index and of those that are being written"""
        self._logged: set[str] = set()
        self._reader = ThreadPoolExecutor(1, "radixgen-kv-reader")
        self._writer = ThreadPoolExecutor(1, "radixgen-kv-writer")
        for file in files.files():
            self._index[file.name] = _IndexEntry(file.num_bytes, file.last_used)
            self._bytes += file.num_bytes
        self._make_room(0)

    def find(self, tokens: TokenArray, namespace: str, first: int) -> list[DiskChunk]:
        """Return consecutive chunks on disk that hold the tokens from position `first` on."""
        if tokens.size - first < self.chunk_tokens:
            return []
        chunks = self._chunks(tokens, namespace)[first // self.chunk_tokens :]
        return list(takewhile(lambda chunk: chunk.name in self._index, chunks))

    def _chunks(self, tokens: TokenArray, namespace: str) -> list[DiskChunk]:
        """Return the whole chunks of a path, as far as it is exact: marks mean nothing to later engines."""
        tokens = tokens[: exact_len(tokens)]
        digest = blake2b(namespace.encode("utf-8", "surrogatepass"), key=self._fingerprint, digest_size=_DIGEST_SIZE)
        content, size = np.ascontiguousarray(tokens, "<i4").data.cast("B"), 4 * self.chunk_tokens
        chunks = []
        for start in range(0, len(content) - size + 1, size):
            digest = blake2b(content[start : start + size], key=digest.digest(), digest_size=_DIGEST_SIZE)
            chunks.append(DiskChunk(digest.hexdigest(), start // 4))
        return chunks

    # -- reading ------------------------------------------------------------------------------------------

    def read(self, chunks: Sequence[DiskChunk], first: int, host_slots: NDArray[np.int64]) -> DiskJob:
        """Begin to read the tokens of `chunks` from position `first` on to `host_slots` int64 `[tokens]`."""
        self._use(chunks)
        return DiskJob(chunks, self._reader.submit(self._read, chunks, first, host_slots))

    def complete_read(self, job: DiskJob) -> bool:
        """Count a read that is done. Returns False if it failed; the file that caused it is deleted then."""
        error = job.error
        if error is None:
            self.read_tokens += len(job.chunks) * self.chunk_tokens
            self.read_seconds += job.seconds
            return True
        self.failed_files += 1
        self._log("KV could not be read and is computed again", error)
        for chunk in job.chunks:
            if not isinstance(error, _ReadFailed) or error.name == chunk.name:
                self._drop(chunk.name)
        return False

    def _read(self, chunks: Sequence[DiskChunk], first: int, host_slots: NDArray[np.int64]) -> float:
        began, filled = time.perf_counter(), 0
        for chunk in chunks:
            try:
                records = self._files.read(chunk.name)[max(first - chunk.start, 0) :]
            except (OSError, DamagedFile) as error:
                raise _ReadFailed(chunk.name) from error
            self._records.write_records(host_slots[filled : filled + len(records)], records)
            filled += len(records)
        return time.perf_counter() - began

    # -- writing ------------------------------------------------------------------------------------------

    def lacking(self, tokens: TokenArray, namespace: str) -> list[DiskChunk]:
        """Return the chunks of a path to write: those that are not on disk, as far as there is room for them. Those on
        disk count as used now.
        """
        chunks = self._chunks(tokens, namespace)[: self._max_files]
        self._use(chunks)
        lacking = [chunk for chunk in chunks if chunk.name not in self._index and chunk.name not in self._writing]
        room = max(self._max_writing - len(self._writing), 0) if self._writing else self._max_files
        self.skipped_tokens += len(lacking[room:]) * self.chunk_tokens
        return lacking[:room]

    def write(self, chunks: Sequence[DiskChunk], slots: NDArray[np.int64], ready: Callable[[], object]) -> DiskJob:
        """Begin to write `chunks`, once `ready` returns. `slots` int64 `[tokens]`: those of the host, from position 0
        on, which nobody else may write until the job is done.
        """
        self._make_room(len(chunks) * self._files.file_bytes)
        self._bytes += len(chunks) * self._files.file_bytes
        self._writing.update(chunk.name for chunk in chunks)
        parts = [slots[chunk.start : chunk.start + self.chunk_tokens] for chunk in chunks]
        return DiskJob(chunks, self._writer.submit(self._write, chunks, parts, ready))

    def complete_write(self, job: DiskJob) -> None:
        """Index what a job that is done has written."""
        self._writing.difference_update(chunk.name for chunk in job.chunks)
        if (error := job.error) is None:
            self.written_tokens += len(job.chunks) * self.chunk_tokens
        else:
            self.skipped_tokens += len(job.chunks) * self.chunk_tokens
            self._log("KV could not be written to disk", error)
        now = time.time()
        for chunk in reversed(job.chunks):
            self._index[chunk.name] = _IndexEntry(self._files.file_bytes, now)
            if error is not None:
                self._drop(chunk.name)

    def _write(
        self, chunks: Sequence[DiskChunk], parts: Sequence[NDArray[np.int64]], ready: Callable[[], object]
    ) -> float:
        began = time.perf_counter()
        ready()
        for chunk, slots in zip(chunks, parts, strict=True):
            self._files.write(chunk.name, self._records.read_records(slots))
        self._files.touch(chunk.name for chunk in reversed(chunks))  # a chunk is of no use without those before it
        return time.perf_counter() - began

    # -- room ---------------------------------------------------------------------------------------------

    def reset(self) -> int:
        """Delete all files that no job uses. Returns their number of tokens."""
        count = len(self._index) * self.chunk_tokens
        for name in list(self._index):
            self._drop(name)
        return count

    def figures(self) -> dict[str, Any]:
        """Return the tier's fields of `Stats`."""
        return {
            "kv_bytes_disk_total": self._max_bytes,
            "kv_bytes_disk_used": self._bytes,
            "kv_tokens_disk": len(self._index) * self.chunk_tokens,
            "disk_written_tokens": self.written_tokens,
            "disk_read_tokens": self.read_tokens,
            "disk_evicted_tokens": self.evicted_tokens,
            "disk_skipped_tokens": self.skipped_tokens,
            "disk_failed_files": self.failed_files,
            "disk_read_seconds": self.read_seconds,
        }

    def close(self) -> None:
        """Finish writing, and release the folder."""
        self._reader.shutdown(cancel_futures=True)
        self._writer.shutdown()
        self._files.close()

    def check(self) -> None:
        """Assert that the bytes add up and stay within the bound."""
        indexed = sum(file.num_bytes for file in self._index.values())
        assert self._bytes == indexed + len(self._writing) * self._files.file_bytes <= self._max_bytes
        assert self._writing.isdisjoint(self._index)

    def _use(self, chunks: Sequence[DiskChunk]) -> None:
        """Move files to the end of the order, the last chunk first, since it is of no use without the others."""
        now, stale = time.time(), []
        for chunk in reversed(chunks):
            file = self._index.pop(chunk.name, None)
            if file is None:
                continue
            self._index[chunk.name] = file
            if now - file.touched > _TOUCH_SECONDS:
                file.touched = now
                stale.append(chunk.name)
        if stale:
            self._writer.submit(self._files.touch, stale)

    def _make_room(self, num_bytes: int) -> None:
        """Delete the least recently used files until `num_bytes` more are within the bound, or none is left."""
        while self._index and self._bytes + num_bytes > self._max_bytes:
            self._drop(next(iter(self._index)))
            self.evicted_tokens += self.chunk_tokens

    def _drop(self, name: str) -> None:
        """Delete a file, and remove it from the index."""
        file = self._index.pop(name, None)
        if file is not None:
            self._bytes -= file.num_bytes
            self._writer.submit(self._files.delete, name)

    def _log(self, message: str, error: BaseException) -> None:
        """Log each kind of failure once."""
        if message not in self._logged:
            self._logged.add(message)
            logger.warning("%s; further cases are not logged", message, exc_info=error)
