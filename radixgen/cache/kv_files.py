"""Files of a folder that keeps KV on disk: chunks of a fixed number of tokens, in the safetensors format.

A chunk is written under another name and renamed when it is complete, so killing the process leaves whole files and at
most one unfinished one, which the next start deletes. Nothing waits for the disk (no fsync): after a power failure a
file may be damaged. A read therefore accepts only a file whose header is, byte by byte, the one that follows from its
name and from the checksum of its content.
"""

import fcntl
import json
import os
import stat
import time
from collections.abc import Iterable
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.core import InvalidRequest

CHUNK_TOKENS = 64
"""Tokens of a file."""
_FORMAT = "radixgen-kv-1"
_SUFFIX, _UNFINISHED = ".safetensors", ".unfinished"
_NAME_LEN = 40
_ALIGNMENT = 64
_SECRET_BYTES = 32


class DamagedFile(ValueError):
    """A file is not what was written under its name."""


class KVFile(NamedTuple):
    """A file of the folder."""

    name: str
    num_bytes: int
    last_used: float
    """Seconds since 1970."""


class KVFiles:
    """A folder of chunks, each with one record of `record_bytes` bytes for each of `chunk_tokens` tokens.

    The folder belongs to one process until `close`. All other methods may be called from any thread.
    """

    def __init__(self, folder: Path, record_bytes: int, chunk_tokens: int) -> None:
        """Create the folder, open to its owner alone, if it is missing. Raises `InvalidRequest`."""
        self.chunk_tokens = chunk_tokens
        self.record_bytes = record_bytes
        self.file_bytes = len(_header("0" * _NAME_LEN, chunk_tokens, record_bytes, b"")) + chunk_tokens * record_bytes
        self._folder = folder
        self._lock = _open_folder(folder)
        for path in folder.glob(f"*{_UNFINISHED}"):
            path.unlink(missing_ok=True)

    def files(self) -> list[KVFile]:
        """Return all chunks, including those of other models and settings, least recently used first."""
        files = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                name = entry.name.removesuffix(_SUFFIX)
                if name != entry.name and len(name) == _NAME_LEN and entry.is_file(follow_symlinks=False):
                    status = entry.stat(follow_symlinks=False)
                    files.append(KVFile(name, status.st_size, status.st_mtime))
        return sorted(files, key=lambda file: file.last_used)

    def write(self, name: str, records: NDArray[np.uint8]) -> None:
        """Write `records` `[chunk_tokens, record_bytes]`, contiguous. Raises `OSError`."""
        header = _header(name, self.chunk_tokens, self.record_bytes, _checksum(records))
        _write_whole(self._path(name), header, records.data.cast("B"))

    def read(self, name: str) -> NDArray[np.uint8]:
        """Return the records of a chunk, uint8 `[chunk_tokens, record_bytes]`. Raises `OSError` and `DamagedFile`."""
        content = self._content(name)
        records = content[content.size - self.chunk_tokens * self.record_bytes :]
        header = content[: content.size - records.size].tobytes()
        if header != _header(name, self.chunk_tokens, self.record_bytes, _checksum(records)):
            raise DamagedFile(f"{self._path(name)} is damaged")
        return records.reshape(self.chunk_tokens, self.record_bytes)

    def touch(self, names: Iterable[str]) -> None:
        """Mark those chunks that exist as used now, in this order."""
        for name in names:
            with suppress(OSError):
                os.utime(self._path(name), ns=(time.time_ns(),) * 2)

    def delete(self, name: str) -> None:
        """Delete a chunk if it exists."""
        with suppress(OSError):
            self._path(name).unlink()

    def close(self) -> None:
        """Release the folder. May be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _content(self, name: str) -> NDArray[np.uint8]:
        """Return the bytes of a file. Raises `OSError`, and `DamagedFile` if it has another size."""
        content = np.empty(self.file_bytes + 1, np.uint8)
        size = 0
        with self._path(name).open("rb", buffering=0) as file:
            while count := file.readinto(content.data[size:]):
                size += count
        if size != self.file_bytes:
            raise DamagedFile(f"{self._path(name)} does not have {self.file_bytes} bytes")
        return content[:size]

    def _path(self, name: str) -> Path:
        return self._folder / (name + _SUFFIX)


def folder_secret(folder: Path) -> bytes:
    """Return 32 random bytes that stay the same while the folder exists, to key the namespaces of KV in it.

    Called by the process that has the folder open. Raises `OSError`.
    """
    path = folder.expanduser() / "secret"
    with suppress(FileNotFoundError):
        secret = path.read_bytes()
        if len(secret) == _SECRET_BYTES:
            return secret
    secret = os.urandom(_SECRET_BYTES)
    _write_whole(path, secret)
    return secret


def _open_folder(folder: Path) -> int:
    """Create the folder if it is missing, and lock it. Returns a file descriptor that holds the lock."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise InvalidRequest("kv_dir", str(folder), f"must be a folder to write to: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            mode = f"{stat.S_IMODE(status.st_mode):04o}"
            raise InvalidRequest("kv_dir", str(folder), f"must be yours alone (chmod 700), but its mode is {mode}")
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise InvalidRequest("kv_dir", str(folder), "must be a folder to write to: Permission denied")
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise InvalidRequest("kv_dir", str(folder), "is in use by another engine; each needs its own") from error
    except InvalidRequest:
        os.close(descriptor)
        raise
    return descriptor


def _header(name: str, tokens: int, record_bytes: int, checksum: bytes) -> bytes:
    """Return the part of a file before the records."""
    tensor = {"dtype": "U8", "shape": [tokens, record_bytes], "data_offsets": [0, tokens * record_bytes]}
    metadata = {"format": _FORMAT, "name": name, "checksum": checksum.hex() or "0" * 32}
    text = json.dumps({"__metadata__": metadata, "kv": tensor}, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _checksum(records: NDArray[np.uint8]) -> bytes:
    return blake2b(records.data.cast("B"), digest_size=16).digest()


def _write_whole(path: Path, *parts: bytes | memoryview) -> None:
    """Write a file that only its owner can read, and that has its name only once it is complete. Raises `OSError`."""
    unfinished = path.with_suffix(_UNFINISHED)
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        try:
            for part in parts:
                left = memoryview(part)
                while left:
                    left = left[os.write(descriptor, left) :]
        finally:
            os.close(descriptor)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise
