"""The disk tier of a model's KV, in a folder that the caller names."""

from pathlib import Path

from radixgen.cache import CHUNK_TOKENS, DiskTier, HostRecords, KVFiles
from radixgen.cache.storage import free_host_bytes
from radixgen.core import DEFAULT_KV_DIR_BYTES, InvalidRequest, check_integer
from radixgen.model.base import Model, SupportsDiskKV

_MAX_HOST_BYTES, _HOST_SHARE = 4 << 30, 0.25
"""The default host tier takes at most so many bytes, and at most this share of the free memory."""
_HOST_POOLS = 4
"""Its size, in pools"""


def default_host_tokens(model: Model, slots: int) -> int:
    """Return the size in tokens of the host tier that goes with a folder by default: four pools of `slots`, within
    bounds of memory.
    """
    room = min(_MAX_HOST_BYTES, int(_HOST_SHARE * free_host_bytes())) // model.kv_bytes_per_token
    return max(min(_HOST_POOLS * slots, room), CHUNK_TOKENS)


def check_kv_dir(folder: str | Path | None, max_bytes: int | None) -> None:
    """Raise `InvalidRequest` for an invalid option, before anything is loaded."""
    if folder is not None and (not isinstance(folder, str | Path) or not str(folder)):
        raise InvalidRequest("kv_dir", folder, "must be the path of a folder")
    if max_bytes is not None:
        check_integer("kv_dir_bytes", max_bytes, 1, 2**63 - 1)
        if folder is None:
            raise InvalidRequest("kv_dir_bytes", max_bytes, "goes with kv_dir")


def open_kv_dir(model: Model, host_kv: object, folder: str | Path, max_bytes: int | None) -> DiskTier:
    """Open the folder for the KV of `model`. `host_kv`: what `model.host_kv` returned. Raises `InvalidRequest`."""
    if not isinstance(host_kv, HostRecords) or not isinstance(model, SupportsDiskKV):
        raise InvalidRequest("kv_dir", str(folder), f"must be None: {model.name} does not keep KV on disk")
    files = KVFiles(Path(folder).expanduser(), host_kv.record_bytes, CHUNK_TOKENS)
    try:
        max_bytes = DEFAULT_KV_DIR_BYTES if max_bytes is None else max_bytes
        if max_bytes < files.file_bytes:
            limit = f"must be at least {files.file_bytes}, a file of {files.chunk_tokens} tokens"
            raise InvalidRequest("kv_dir_bytes", max_bytes, limit)
        if host_kv.num_slots < files.chunk_tokens:
            limit = f"needs a host tier of at least {files.chunk_tokens} tokens, not {host_kv.num_slots}"
            raise InvalidRequest("kv_dir", str(folder), limit)
        return DiskTier(files, host_kv, model.kv_fingerprint(), max_bytes)
    except BaseException:
        files.close()
        raise
