"""The one place where environment variables are read or set."""

import os
import socket
import sys
from pathlib import Path


CACHE_VARIABLE = "RADIXGEN_CACHE"


def cache_dir() -> Path:
    """Where radixgen keeps the embedded model: `RADIXGEN_CACHE`, else `radixgen` in the user's cache. An empty variable
    counts as none. Raises `FileNotFoundError` where neither is to be had.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    path = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "radixgen"
    try:
        if path.parts[:1] == ("~",) and os.environ.get("HOME") == "":
            raise RuntimeError("HOME is empty")
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path}: {error}; set {CACHE_VARIABLE} to a directory") from error


def flash_attention_3() -> Path | None:
    """The library of FlashAttention-3 that benchmarks compare against: `RADIXGEN_FLASH_ATTENTION_3`."""
    chosen = os.environ.get("RADIXGEN_FLASH_ATTENTION_3")
    return Path(chosen).expanduser() if chosen else None


def api_keys() -> list[str]:
    """Keys that callers of the HTTP server have: `RADIXGEN_API_KEY`, several with commas between them."""
    return [key.strip() for key in os.environ.get("RADIXGEN_API_KEY", "").split(",") if key.strip()]


def wait_without_spinning() -> None:
    """Let OpenMP's threads sleep while they wait, unless `OMP_WAIT_POLICY` says otherwise.

    Spinning threads on cores that others use too are far slower than one thread. Has an effect only before torch is
    imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def use_loopback() -> None:
    """Let the ranks of a model talk over this machine's loopback, unless `GLOO_SOCKET_IFNAME` or `NCCL_SOCKET_IFNAME`
    say otherwise.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)


def rank_environment(rank: int) -> dict[str, str]:
    """As this process's, with its import path, and with `LOCAL_RANK`, by which transformers takes a GPU."""
    path = os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)
    return os.environ | {"LOCAL_RANK": str(rank), "PYTHONPATH": path}
