"""Checksums of the files in a directory, to detect changes.

The manifest beside the files has a hash of each. Files are hashed in parts by several threads: half a gigabyte takes a
fraction of a second.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from stat import S_ISREG

MANIFEST = "radixgen-manifest.json"
_PART_BYTES = 1 << 20

_Hashes = tuple[tuple[str, str], ...]
_Stamps = tuple[tuple[int, int, int], ...]


def write_manifest(folder: Path) -> None:
    """Hash all files in `folder` and write a manifest beside them."""
    names = sorted(path.name for path in folder.iterdir())
    with ThreadPoolExecutor() as pool:
        hashes = {name: _hash(folder / name, pool) for name in names}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=1))


def damage(folder: Path, known: Mapping[str, str] | None = None) -> str:
    """Describe briefly what changed in `folder` since `write_manifest`; empty if nothing did.

    `known`: hashes to use if there is no manifest.

    Ignores hidden files. Files unchanged since the last call are not hashed again.
    """
    try:
        stats = {path.name: path.stat() for path in folder.iterdir() if not path.name.startswith(".")}
        manifest = stats.pop(MANIFEST, None)
        if manifest is not None and not S_ISREG(manifest.st_mode):
            return f"{MANIFEST} is no file"
        hashes = known if known and manifest is None else json.loads((folder / MANIFEST).read_text())
        if not isinstance(hashes, Mapping) or not hashes:
            return f"{MANIFEST} has changed"
        if stats.keys() != hashes.keys():
            return f"{min(stats.keys() ^ hashes.keys())} is {'missing' if hashes.keys() - stats.keys() else 'new'}"
        if odd := [name for name in sorted(stats) if not S_ISREG(stats[name].st_mode)]:
            return f"{odd[0]} is no file"
        expected = tuple((name, str(hashes[name])) for name in sorted(hashes))
        stamps = tuple((stats[name].st_ino, stats[name].st_size, stats[name].st_mtime_ns) for name in sorted(stats))
        _check(folder, expected, stamps)
    except OSError as error:
        return f"{Path(error.filename or MANIFEST).name}: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""


@lru_cache(maxsize=1)
def _check(folder: Path, expected: _Hashes, stamps: _Stamps) -> None:
    """Raise `ValueError` if a file has another hash. Only successful checks are cached."""
    with ThreadPoolExecutor() as pool:
        for name, digest in expected:
            if _hash(folder / name, pool) != digest:
                raise ValueError(f"{name} has changed")


def _hash(path: Path, pool: Executor) -> str:
    """Return the SHA-256 of the SHA-256 hashes of all parts."""
    with path.open("rb") as file:
        starts = range(0, os.fstat(file.fileno()).st_size, _PART_BYTES)
        return sha256(b"".join(pool.map(partial(_hash_part, file.fileno()), starts))).hexdigest()


def _hash_part(descriptor: int, start: int) -> bytes:
    return sha256(os.pread(descriptor, _PART_BYTES, start)).digest()
