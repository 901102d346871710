"""Environment variables. No other module reads or sets them."""

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

CACHE_VARIABLE = "RADIXGEN_CACHE"


def cache_dir() -> Path:
    """Return the directory for the embedded model and compiled code: `RADIXGEN_CACHE`, or `radixgen` in the user's
    cache.

    An empty variable counts as unset. Raises `FileNotFoundError` if the home directory is unknown.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    path = Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "radixgen"
    try:
        if path.parts[:1] == ("~",) and os.environ.get("HOME") == "":
            raise RuntimeError("HOME is empty")
        return path.expanduser().absolute()
    except RuntimeError as error:
        raise FileNotFoundError(f"{path}: {error}; set {CACHE_VARIABLE} to a directory") from error


def keep_compiled(default: str) -> None:
    """Set PyTorch's and Triton's kernel caches to directories below `cache_dir`, so that kernels survive a reboot.

    Does nothing if `TORCHINDUCTOR_CACHE_DIR` differs from `default`, the value that PyTorch sets itself when imported,
    or if the directory is not writable. `TRITON_CACHE_DIR` is never overwritten.
    """
    if os.environ.get("TORCHINDUCTOR_CACHE_DIR", default) != default:
        return
    with suppress(OSError):
        folder = cache_dir() / "inductor"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK | os.X_OK):
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
            os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))


def flash_attention_3() -> Path | None:
    """Return the FlashAttention-3 library that benchmarks compare with: `RADIXGEN_FLASH_ATTENTION_3`."""
    chosen = os.environ.get("RADIXGEN_FLASH_ATTENTION_3")
    return Path(chosen).expanduser() if chosen else None


def api_keys() -> list[str]:
    """Return the API keys of the HTTP server: `RADIXGEN_API_KEY`, comma-separated."""
    return [key.strip() for key in os.environ.get("RADIXGEN_API_KEY", "").split(",") if key.strip()]


def wait_without_spinning() -> None:
    """Make idle OpenMP threads sleep, unless a variable says how they wait. Does nothing once torch is imported, whose
    OpenMP has then read its variables.

    On cores shared with other processes, spinning threads are far slower than a single thread.
    """
    if "torch" not in sys.modules and threads_spin():
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"


def threads_spin() -> bool:
    """Return whether idle OpenMP threads spin by default: no variable says how they wait."""
    return not any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"))


def rank_environment(rank: int) -> dict[str, str]:
    """Return this process's environment with its import path and the variables of a rank."""
    return os.environ | _import_path() | _rank_variables(rank)


def visible_gpus(count: int) -> list[str]:
    """Return the names of the first `count` visible GPUs, as in `CUDA_VISIBLE_DEVICES`."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if chosen is None else chosen.split(",")
    return [name.strip() for name in names[:count]]


def replica_environment(gpus: Sequence[str], processes: int) -> dict[str, str]:
    """Return this process's environment with its import path, for one of `processes` processes on this machine.

    The process sees only `gpus`, or all if empty. It uses its share of the cores for OpenMP unless `OMP_NUM_THREADS` is
    set.
    """
    variables = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))} | os.environ | _import_path()
    return variables | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


def _import_path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)}


@contextmanager
def as_rank_0() -> Iterator[None]:
    """Set the environment variables of rank 0 within the context."""
    variables = _rank_variables(0)
    before = {name: os.environ[name] for name in variables if name in os.environ}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update(before)


def _rank_variables(rank: int) -> dict[str, str]:
    """Return the variables of a rank, except those that are set already.

    `LOCAL_RANK` selects the GPU in transformers. `GLOO_SOCKET_IFNAME` and `NCCL_SOCKET_IFNAME` select the loopback
    interface. The others turn NVLink multicast off.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    defaults = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    if loopback:
        defaults |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback)
    unset = {name: value for name, value in defaults.items() if name not in os.environ}
    return {"LOCAL_RANK": str(rank)} | unset
