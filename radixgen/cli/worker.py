"""`radixgen worker`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from radixgen.cli.errors import report_errors
from radixgen.cli.options import (
    DEFAULT_KV_DIR_SIZE,
    DEFAULT_LIMITS,
    DEFAULT_MODEL,
    Device,
    DrainTimeout,
    Dtype,
    EnforceEager,
    EngineSeed,
    KVCacheDtype,
    KVDir,
    KVDirSize,
    KVOffloadingSize,
    KVTokens,
    LoadFormat,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    Model,
    Profile,
    ProfileSteps,
    Quantization,
    StallTimeout,
    TensorParallel,
    WarmUp,
    engine_arguments,
)
from radixgen.core import InvalidRequest, Limits
from radixgen.progress import announce_loading, waiting

if TYPE_CHECKING:
    from radixgen.engine.engine import Engine


def worker(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    backend: Annotated[
        str, typer.Option(help="Protocol: zmq (vLLM's) or dynamo (NVIDIA Dynamo, with its own options).")
    ] = "zmq",
    handshake: Annotated[
        list[str] | None,
        typer.Option(help="Handshake address of a front end (serve's --zmq). Can be given multiple times."),
    ] = None,
    smg: Annotated[str | None, typer.Option(help="This worker's URL in SMG's --worker-urls (ipc://).")] = None,
    engine_index: Annotated[int, typer.Option(help="Index of this worker, unique per front end.")] = 0,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    device: Device = "auto",
    tp: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = DEFAULT_LIMITS.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_tokens: KVTokens = None,
    kv_offloading_size: KVOffloadingSize = 0.0,
    kv_dir: KVDir = None,
    kv_dir_size: KVDirSize = DEFAULT_KV_DIR_SIZE,
    enforce_eager: EnforceEager = False,
    warm_up: WarmUp = None,
    seed: EngineSeed = 0,
    profile: Profile = None,
    profile_steps: ProfileSteps = 10,
    kv_events_config: Annotated[
        str | None,
        typer.Option(help="KV cache event configuration as JSON, in vLLM's format. Requires --backend zmq."),
    ] = None,
    curve_secret: Annotated[
        Path | None, typer.Option(exists=True, help="File with this worker's CURVE keys, for TCP.")
    ] = None,
    curve_server: Annotated[
        Path | None, typer.Option(exists=True, help="File with the front end's public CURVE key.")
    ] = None,
    allow_insecure_tcp: Annotated[bool, typer.Option(help="Allow unencrypted TCP without authentication.")] = False,
    drain_timeout: DrainTimeout = 25.0,
    stall_timeout: StallTimeout = 60.0,
    parent_fd: Annotated[
        int | None, typer.Option(hidden=True, help="File descriptor of a pipe; the worker stops when it is closed.")
    ] = None,
) -> None:
    """Run a worker for radixgen serve --zmq, SMG, NVIDIA Dynamo or radixgen.Client.

    On SIGTERM it refuses new requests and finishes open ones; a second SIGTERM stops it at once.
    """
    limits = Limits(max_num_seqs=max_num_seqs)
    with report_errors():
        arguments = engine_arguments(context.params)
        if kv_dir is not None and parent_fd is not None:  # replicas of one server are given the same folder
            arguments["kv_dir"] = kv_dir / str(engine_index)
        if profile is not None:
            from radixgen.engine.profiler import check_profile

            check_profile(profile, profile_steps)
        if backend == "dynamo":
            zmq_only = {
                "handshake": handshake,
                "smg": smg,
                "engine_index": engine_index,
                "kv_events_config": kv_events_config,
                "curve_secret": curve_secret,
                "curve_server": curve_server,
                "allow_insecure_tcp": allow_insecure_tcp,
            }
            for field, value in zmq_only.items():
                if value:
                    raise InvalidRequest(field, value, "requires --backend zmq")
            engine = arguments | {"limits": limits, "warm_up": warm_up}
            _serve_dynamo(context.args, model, engine, drain_timeout, profile, profile_steps)
            return
        if backend != "zmq":
            raise InvalidRequest("backend", backend, "must be zmq or dynamo")
        if context.args:
            raise typer.BadParameter(f"No such option or argument: {context.args[0]}")
        import logging

        from radixgen.serve.zmq.launch import run_worker

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

        def load() -> "Engine":
            from radixgen.engine.engine import Engine
            from radixgen.engine.warm_up import announce_warm_up

            interactive = None if parent_fd is None else False  # replicas share one terminal: no spinners
            with waiting(Console(stderr=True, force_terminal=interactive)) as say:
                announce_loading(say, model)
                engine = Engine(model, limits=limits, warm_up=False, **arguments)
                if profile is not None:
                    engine.profile(profile, profile_steps)
                if engine.runs_on_gpu if warm_up is None else warm_up:
                    engine.warm_up(announce_warm_up(say))
                return engine

        drained = run_worker(
            load,
            handshake or (),
            smg=smg,
            engine_index=engine_index,
            kv_events_config=kv_events_config,
            curve_secret=curve_secret,
            curve_server=curve_server,
            insecure_tcp=allow_insecure_tcp,
            drain_timeout=drain_timeout,
            stall_timeout=stall_timeout,
            parent_fd=parent_fd,
        )
    raise typer.Exit(0 if drained else 1)


def _serve_dynamo(extra_arguments: list[str], *launch: Any) -> None:
    """Run Dynamo's own worker until it ends. extra_arguments: options that Dynamo defines."""
    try:
        from radixgen.serve.dynamo.engine import LaunchOptions, main
    except ModuleNotFoundError as error:
        raise InvalidRequest("backend", "dynamo", "requires pip install 'radixgen[dynamo]'") from error
    main(LaunchOptions(*launch), extra_arguments)
