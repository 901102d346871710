"""Options that several commands share, and checks of options that exclude each other."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from radixgen.core import DEFAULT_KV_DIR_BYTES, InvalidRequest, Limits, SegmentReuse
from radixgen.core.reuse import check_reuse
from radixgen.model import smollm2

DEFAULT_MODEL = smollm2.NAME
DEFAULT_LIMITS = Limits()
DEFAULT_KV_DIR_SIZE = DEFAULT_KV_DIR_BYTES / 2**30
DEFAULT_REUSE = SegmentReuse()
_MAX_KV_DIR_GIB = 2**20

Model = Annotated[str, typer.Option("--model", "-m", help="Model: smollm2, a directory, a .gguf file or a hub id.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum number of tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="Sampling temperature; 0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Cumulative probability of the top tokens to consider.")]
TopK = Annotated[int, typer.Option(help="Sample from the K likeliest tokens; 0 means all.")]
Seed = Annotated[int | None, typer.Option(help="Sampling seed.")]
LoadFormat = Annotated[str, typer.Option(help="Weights: auto (read the checkpoint) or dummy (random).")]
Dtype = Annotated[str, typer.Option(help="Data type of the model: auto, float32, bfloat16 or float16.")]
Quantization = Annotated[
    str | None,
    typer.Option(
        "--quantization", "-q", help="Round weights: int8, int4 or gguf (CPU), fp8 (GPU).", show_default="as they are"
    ),
]
KVCacheDtype = Annotated[str, typer.Option(help="Data type of the KV cache: auto (the model's), int8 or fp8.")]
GenerationConfig = Annotated[
    str, typer.Option(help="Sampling defaults: auto (the model's file), vllm (ignore the file) or a path.")
]
Device = Annotated[str, typer.Option(help="Device: auto, cpu or cuda.")]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size", "--tp", help="Number of GPUs (on a CPU: processes) to shard the model over."
    ),
]
DataParallel = Annotated[
    int, typer.Option("--data-parallel-size", "-dp", help="Number of replicas behind one address.")
]
MaxModelLen = Annotated[
    int | None,
    typer.Option(help="Maximum length of prompt plus output, in tokens.", show_default="the model's maximum"),
]
MaxNumSeqs = Annotated[int, typer.Option(help="Maximum number of running sequences.")]
MaxNumBatchedTokens = Annotated[
    int | None,
    typer.Option(help="Maximum number of tokens per step.", show_default="2048; 8192 on a GPU of 32 GiB or more"),
]
EnforceEager = Annotated[bool, typer.Option("--enforce-eager", help="Disable model compilation and CUDA graphs.")]
WarmUp = Annotated[
    bool | None,
    typer.Option(
        "--warm-up/--no-warm-up", help="Compile and capture before accepting requests.", show_default="on a GPU"
    ),
]
Profile = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Write a torch profiler trace of the steps after the first here.")
]
ProfileSteps = Annotated[int, typer.Option(help="Number of steps in the trace of --profile.")]
EngineSeed = Annotated[int, typer.Option(help="Base seed; each request without a seed gets one derived from it.")]
KVTokens = Annotated[
    int | None,
    typer.Option("--kv-tokens", help="Size of the KV cache, in tokens.", show_default="as many as fit in memory"),
]
KVOffloadingSize = Annotated[
    float, typer.Option("--kv-offloading-size", help="Host memory for KV that the KV cache evicts, in GiB.")
]
KVDir = Annotated[
    Path | None, typer.Option("--kv-dir", metavar="DIR", help="Keep KV on disk here, also for later starts.")
]
Reading = Annotated[
    str | None, typer.Option(metavar="JSON", help='Reading policy, as {"policy": "window", "window": 1024}.')
]
Reuse = Annotated[str, typer.Option(help="Cached tokens to use: prefix, or segments (more, but inexact).")]
MinRun = Annotated[int, typer.Option(help="Shortest run that --reuse segments takes, in tokens.")]
Recompute = Annotated[float, typer.Option(help="Share of each run that --reuse segments computes anew.")]
KVDirSize = Annotated[float, typer.Option("--kv-dir-size", help="Maximum size of --kv-dir, in GiB.")]
DrainTimeout = Annotated[
    float,
    typer.Option("--shutdown-timeout", "--drain-timeout", help="Seconds to wait for open requests after SIGTERM."),
]
StallTimeout = Annotated[float, typer.Option(help="Unhealthy after this many seconds with work but no progress.")]
PromptFile = Annotated[
    Path | None, typer.Argument(exists=True, dir_okay=False, help="Prompts, one per line. Read from stdin if omitted.")
]


ENGINE_OPTIONS = {
    "load_format": "load_format",
    "dtype": "dtype",
    "quantization": "quantization",
    "kv_cache_dtype": "kv_dtype",
    "device": "device",
    "tp": "tensor_parallel_size",
    "max_model_len": "max_model_len",
    "max_num_batched_tokens": "max_step_tokens",
    "kv_tokens": "kv_tokens",
    "kv_offloading_size": "kv_offloading_size",
    "kv_dir": "kv_dir",
    "kv_dir_size": "kv_dir_bytes",
    "enforce_eager": "enforce_eager",
    "seed": "seed",
}
"""Options of commands that are arguments of `Engine`, with their names there"""
PROCESS_OPTIONS = ("warm_up", "profile", "profile_steps")
"""Options about a process with an engine, besides `ENGINE_OPTIONS`"""


def engine_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `Engine` that a command's options are. Raises `InvalidRequest`."""
    folder = options["kv_dir"] and Path(options["kv_dir"])
    given = {**options, "kv_dir": folder, "kv_dir_size": kv_dir_bytes(folder, options["kv_dir_size"])}
    return {own: given[name] for name, own in ENGINE_OPTIONS.items() if name in given}


def kv_dir_bytes(folder: Path | None, gib: float) -> int | None:
    """The value of `--kv-dir-size` in bytes, or None without a folder. Raises `InvalidRequest`."""
    if not 0.0 < gib <= _MAX_KV_DIR_GIB:
        raise InvalidRequest("kv_dir_size", gib, f"must be above 0 and at most {_MAX_KV_DIR_GIB} GiB")
    return None if folder is None else int(gib * 2**30)


def reuse_settings(reuse: str, min_run: int, recompute: float) -> Literal["prefix"] | SegmentReuse:
    """The value of `Engine(reuse=...)` for these options. Raises `InvalidRequest`."""
    settings = SegmentReuse(min_run, recompute)
    if reuse == "segments":
        return settings
    if settings != DEFAULT_REUSE:
        raise InvalidRequest("reuse", reuse, "must be segments for --min-run and --recompute")
    check_reuse(reuse)
    return "prefix"


def replica_flags(model: str, options: Mapping[str, Any]) -> list[str]:
    """The arguments of `radixgen worker` for replicas of a server with these options, but for GPUs."""
    names = {*ENGINE_OPTIONS, *PROCESS_OPTIONS, "max_num_seqs"} - {"tp", "device"}
    shared = {name: options[name] for name in sorted(names)}
    return _to_flags({"model": model, "no_warm_up": options["warm_up"] is False, **shared})


def _to_flags(options: dict[str, Any]) -> list[str]:
    """Options as command-line arguments, without those that are None or False."""
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            flags.append(f"{flag}={value}")
    return flags


def reject_options(context: typer.Context, names: Iterable[str], reason: str) -> None:
    """Raise `InvalidRequest` for the first of these options that is on the command line."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidRequest(name, context.params[name], reason)
