"""`radixgen serve`."""

from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console

from radixgen.cli.errors import report_errors, require_extra
from radixgen.cli.options import (
    DEFAULT_KV_DIR_SIZE,
    DEFAULT_LIMITS,
    DEFAULT_MODEL,
    DEFAULT_REUSE,
    ENGINE_OPTIONS,
    PROCESS_OPTIONS,
    DataParallel,
    Device,
    DrainTimeout,
    Dtype,
    EnforceEager,
    EngineSeed,
    GenerationConfig,
    KVCacheDtype,
    KVDir,
    KVDirSize,
    KVOffloadingSize,
    KVTokens,
    LoadFormat,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MinRun,
    Model,
    Profile,
    ProfileSteps,
    Quantization,
    Recompute,
    Reuse,
    StallTimeout,
    TensorParallel,
    WarmUp,
    engine_arguments,
    reject_options,
    replica_flags,
    reuse_settings,
)
from radixgen.core import Limits
from radixgen.progress import announce_loading, waiting

_SINGLE_ENGINE_OPTIONS = ["reuse", "min_run", "recompute"]
"""Options of an engine in this process, rejected with several: workers do not say whether their outputs are exact"""


def serve(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Model to serve; same as --model.")] = None,
    model: Model = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback, --api-key is required.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free port.")] = 8000,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    device: Device = "auto",
    tp: TensorParallel = 1,
    data_parallel_size: DataParallel = 1,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = DEFAULT_LIMITS.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_tokens: KVTokens = None,
    kv_offloading_size: KVOffloadingSize = 0.0,
    kv_dir: KVDir = None,
    kv_dir_size: KVDirSize = DEFAULT_KV_DIR_SIZE,
    reuse: Reuse = "prefix",
    min_run: MinRun = DEFAULT_REUSE.min_run,
    recompute: Recompute = DEFAULT_REUSE.recompute,
    enforce_eager: EnforceEager = False,
    warm_up: WarmUp = None,
    seed: EngineSeed = 0,
    generation_config: GenerationConfig = "auto",
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Model name in the API. Can be given multiple times.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="API key for clients. Can be given multiple times. Also RADIXGEN_API_KEY.")
    ] = None,
    operator_key: Annotated[
        list[str] | None,
        typer.Option(help="API key for administrative routes. Can be given multiple times."),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(help="Maximum number of waiting sequences; further requests get status 429.")
    ] = 1024,
    max_concurrency_per_key: Annotated[
        int | None,
        typer.Option(
            help="Maximum number of sequences per API key.", show_default="half of all if there are several keys"
        ),
    ] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Abort requests after this many seconds.")] = None,
    stall_timeout: StallTimeout = 60,
    timeout_keep_alive: Annotated[int, typer.Option(help="Seconds until an idle connection is closed.")] = 30,
    shutdown_delay: Annotated[
        float,
        typer.Option(help="Seconds to keep accepting requests after SIGTERM while /ready returns 503."),
    ] = 1,
    drain_timeout: DrainTimeout = 30,
    allowed_origins: Annotated[
        list[str] | None, typer.Option(help="Allowed CORS origin; * allows any. Can be given multiple times.")
    ] = None,
    allowed_methods: Annotated[
        list[str] | None, typer.Option(help="Allowed CORS method. Can be given multiple times.", show_default="all")
    ] = None,
    allowed_headers: Annotated[
        list[str] | None,
        typer.Option(help="Allowed CORS request header. Can be given multiple times.", show_default="all"),
    ] = None,
    allow_credentials: Annotated[
        bool, typer.Option("--allow-credentials", help="Allow credentials in CORS requests.")
    ] = False,
    allowed_hosts: Annotated[
        list[str] | None,
        typer.Option(help="Allowed host; *.example.com matches subdomains. Can be given multiple times."),
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path prefix that a proxy adds to every route.")] = "",
    uds: Annotated[str | None, typer.Option(help="Unix socket to listen on instead of --host and --port.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="PEM file with the private key for HTTPS.")] = None,
    ssl_certfile: Annotated[str | None, typer.Option(help="PEM file with the certificate for HTTPS.")] = None,
    ssl_ca_certs: Annotated[str | None, typer.Option(help="PEM file with CA certificates to verify clients.")] = None,
    ssl_cert_reqs: Annotated[int, typer.Option(help="Client certificates: 0 none, 1 optional, 2 required.")] = 0,
    ssl_ciphers: Annotated[str | None, typer.Option(help="Cipher suites for TLS 1.2, in OpenSSL's format.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Chat template that replaces the model's: a file, or text in one line.")
    ] = None,
    ignore_unknown_fields: Annotated[
        bool, typer.Option("--ignore-unknown-fields", help="Ignore unsupported request fields, with a warning.")
    ] = False,
    allow_reading: Annotated[
        list[str] | None,
        typer.Option(help="Reading policy that requests may name, as window. Can be given multiple times."),
    ] = None,
    metrics_compat: Annotated[str | None, typer.Option(help="vllm: add vLLM's metric names to /metrics.")] = None,
    access_log: Annotated[bool, typer.Option(help="Log one line per request.")] = True,
    profile: Profile = None,
    profile_steps: ProfileSteps = 10,
    log_level: Annotated[str, typer.Option(help="Log level: debug, info, warning or error.")] = "info",
    zmq: Annotated[
        str | None,
        typer.Option(help="Address to bind, ipc:// or tcp://; workers connect to it with --handshake."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Number of workers to wait for. Requires --zmq.")] = 1,
) -> None:
    """Serve a model over an OpenAI-compatible HTTP API."""
    from radixgen.core.settings import api_keys

    with report_errors():
        _reject_misplaced_options(context, zmq, data_parallel_size)
        require_extra("serve", "fastapi", "uvicorn", "prometheus_client")
        from radixgen.cache.kv_files import folder_secret
        from radixgen.engine.async_engine import AsyncEngine
        from radixgen.engine.engine import Engine
        from radixgen.engine.profiler import check_profile
        from radixgen.model.sampling_defaults import sampling_defaults
        from radixgen.serve import server
        from radixgen.serve.http.app import ServeOptions
        from radixgen.serve.http.backend import EngineBackend
        from radixgen.serve.http.binding import Binding
        from radixgen.serve.http.custom_template import tokenizer_with_template
        from radixgen.serve.http.origins import OriginPolicy, parse_list
        from radixgen.serve.http.worker_backend import connect, start
        from radixgen.serve.replicas import ReplicaOptions

        if profile is not None:
            check_profile(profile, profile_steps)
        limits = Limits(max_num_seqs=max_num_seqs)
        options = ServeOptions(
            names=served_model_name or [name or model],
            api_keys=[*(api_key or []), *api_keys()],
            operator_keys=operator_key or [],
            max_open=limits.max_num_seqs * data_parallel_size + max_queue,
            max_concurrency_per_key=max_concurrency_per_key,
            request_timeout=request_timeout,
            stall_timeout=stall_timeout,
            metrics_compat=metrics_compat,
            ignore_unknown_fields=ignore_unknown_fields,
            root_path=root_path,
            readings=parse_list("allow_reading", allow_reading),
            origins=OriginPolicy(
                allowed_origins=parse_list("allowed_origins", allowed_origins),
                allowed_methods=parse_list("allowed_methods", allowed_methods) or ["*"],
                allowed_headers=parse_list("allowed_headers", allowed_headers) or ["*"],
                allow_credentials=allow_credentials,
                allowed_hosts=parse_list("allowed_hosts", allowed_hosts),
            ),
        )
        binding = Binding(
            host=host,
            port=port,
            uds=uds,
            timeout_keep_alive=timeout_keep_alive,
            shutdown_delay=shutdown_delay,
            drain_timeout=drain_timeout,
            ssl_keyfile=ssl_keyfile,
            ssl_certfile=ssl_certfile,
            ssl_ca_certs=ssl_ca_certs,
            ssl_cert_reqs=ssl_cert_reqs,
            ssl_ciphers=ssl_ciphers,
            log_level=log_level,
            access_log=access_log,
        )
        replicas = None
        if data_parallel_size != 1:
            replicas = ReplicaOptions(data_parallel_size, tp, device, replica_flags(name or model, context.params))
            replicas.environments()
        options.check()
        binding.check([*options.api_keys, *options.operator_keys])
        with waiting(Console(stderr=True)) as say:
            announce_loading(say, name or model)
            options = replace(options, sampling_defaults=sampling_defaults(name or model, generation_config))
            tokenizer = None if chat_template is None else tokenizer_with_template(name or model, chat_template)
            backend: EngineBackend
            if zmq is not None:
                backend = connect(zmq, model=name or model, tokenizer=tokenizer, workers=workers, limits=limits)
            elif replicas is not None:
                backend = start(replicas, model=name or model, tokenizer=tokenizer, limits=limits)
            else:
                engine = Engine(
                    name or model,
                    warm_up=False,
                    tokenizer=tokenizer,
                    limits=limits,
                    reuse=reuse_settings(reuse, min_run, recompute),
                    **engine_arguments(context.params),
                )
                if profile is not None:
                    engine.profile(profile, profile_steps)
                options = replace(
                    options,
                    warm_up=engine.runs_on_gpu if warm_up is None else warm_up,
                    secret=b"" if kv_dir is None else folder_secret(kv_dir),
                )
                backend = AsyncEngine(engine)
        server.serve(backend, options, binding)


def _reject_misplaced_options(context: typer.Context, zmq: str | None, engines: int) -> None:
    """Raise `InvalidRequest` for options that belong to workers, to a front end, or to a single engine."""
    if zmq is not None:
        of_workers = [*ENGINE_OPTIONS, *PROCESS_OPTIONS]
        reject_options(context, of_workers, "is an option of workers: pass it to `radixgen worker`")
        reject_options(context, ["data_parallel_size"], "starts its own workers; with --zmq, use --workers")
    else:
        reject_options(context, ["workers"], "requires --zmq")
    if zmq is not None or engines != 1:
        reject_options(context, _SINGLE_ENGINE_OPTIONS, "requires a single engine, without --zmq and -dp")
