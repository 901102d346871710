"""`radixgen doctor`."""

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from rich.console import Console

from radixgen.core import InvalidRequest

if TYPE_CHECKING:
    import torch

_EXTRAS = {"structured": ["llguidance"], "serve": ["fastapi", "uvicorn", "prometheus-client"]}


def doctor() -> None:
    """Print versions, devices, attention backends and cache paths."""
    import platform

    import torch
    import transformers
    from rich.table import Table

    from radixgen.core.settings import cache_dir
    from radixgen.kernels.backend import BACKENDS
    from radixgen.kernels.flash_backend import installed
    from radixgen.model.loader import resolve_device
    from radixgen.version import VERSION

    table = Table(show_header=False)
    table.add_row("radixgen", VERSION)
    table.add_row("python", platform.python_version())
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    table.add_row("transformers", transformers.__version__)
    for extra, packages in _EXTRAS.items():
        table.add_row(f"extra {extra}", ", ".join(map(_describe_package, packages)))
    device = resolve_device("auto")
    table.add_row("device", f"{device}{'' if torch.cuda.is_available() else ': PyTorch sees no CUDA device'}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        table.add_row(f"cuda:{index}", f"{name}, {free >> 20:,} of {total >> 20:,} MiB free")
    for name in BACKENDS:
        table.add_row(f"attention: {name}", _describe_backend(name, device))
    table.add_row("flash-attn", installed())
    try:
        table.add_row("cache", str(cache_dir()))
    except FileNotFoundError as error:
        table.add_row("cache", str(error))
    Console().print(table)


def _describe_package(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def _describe_backend(name: str, device: "torch.device") -> str:
    """Whether a backend is used by default on this device, and if not, why."""
    from radixgen.kernels.backend import backend

    chosen = backend("auto", device).name
    if name == chosen:
        return "used: the fastest that runs here"
    try:
        backend(name, device)
    except InvalidRequest as error:
        return f"not used: {error.limit}"
    if name == "flash":
        return f"not used unless requested, or where a calibration predicts that it is faster than {chosen}"
    return f"not used unless requested: {chosen} is faster here"
