"""The one place where environment variables are read or set."""

import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

CACHE_VARIABLE = "RADIXGEN_CACHE"


def cache_dir() -> Path:
    """Where radixgen keeps the embedded model and what is compiled: `RADIXGEN_CACHE`, else `radixgen` in the user's
    cache. An empty variable counts as none. Raises `FileNotFoundError` where neither is to be had.
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
    """Have PyTorch keep the kernels that it compiles in `cache_dir`, and Triton its own, so that they outlive a
    reboot, unless `TORCHINDUCTOR_CACHE_DIR` names another folder than PyTorch's `default`, as that does itself when it
    is imported, or nothing can be written there. `TRITON_CACHE_DIR` stays as it is.
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


def rank_environment(rank: int) -> dict[str, str]:
    """As this process's, with its import path and the variables of a rank."""
    return os.environ | _import_path() | _rank_variables(rank)


def visible_gpus(count: int) -> list[str]:
    """Names of the GPUs that this process sees, `count` of them, as `CUDA_VISIBLE_DEVICES` has them."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if chosen is None else chosen.split(",")
    return [name.strip() for name in names[:count]]


def replica_environment(gpus: Sequence[str], processes: int) -> dict[str, str]:
    """As this process's, with its import path, for one of so many processes on this machine. It sees `gpus` alone; none
    named are all. OpenMP's threads are a share of the cores, unless `OMP_NUM_THREADS` says otherwise.
    """
    variables = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // processes, 1))} | os.environ | _import_path()
    return variables | ({"CUDA_VISIBLE_DEVICES": ",".join(gpus)} if gpus else {})


def _import_path() -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(folder or str(Path.cwd()) for folder in sys.path)}


@contextmanager
def as_rank_0() -> Iterator[None]:
    """Set the environment variables of rank 0, and restore them afterwards."""
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
    """`LOCAL_RANK`, by which transformers takes a GPU; and the loopback, over which ranks talk unless
    `GLOO_SOCKET_IFNAME` or `NCCL_SOCKET_IFNAME` say otherwise. NVLink multicast is off unless its variables are set.
    """
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    defaults = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1"}
    if loopback:
        defaults |= dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"), loopback)
    unset = {name: value for name, value in defaults.items() if name not in os.environ}
    return {"LOCAL_RANK": str(rank)} | unset
