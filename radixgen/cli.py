"""The command line: `radixgen demo | generate | chat | serve | worker | tree | explain | doctor`."""

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from radixgen.core import InvalidRequest, Limits, RadixgenError, SamplingParams, check_texts
from radixgen.core.settings import wait_without_spinning
from radixgen.model.smollm2 import NAME as DEFAULT_MODEL
from radixgen.progress import announce_loading, waiting

if TYPE_CHECKING:
    import torch

    from radixgen.engine import Engine

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_show_locals=False,
)

DEFAULT_LIMITS = Limits()

Model = Annotated[str, typer.Option("--model", "-m", help="smollm2, a directory, a .gguf file, or a hub id.")]
MaxTokens = Annotated[int, typer.Option(help="Maximum tokens to generate.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Keep the likeliest tokens up to this probability.")]
TopK = Annotated[int, typer.Option(help="Keep this many tokens; 0 keeps all.")]
Seed = Annotated[int | None, typer.Option(help="Sampling seed.")]
LoadFormat = Annotated[str, typer.Option(help="auto: read the checkpoint. dummy: random weights.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
GenerationConfig = Annotated[str, typer.Option(help="Sampling defaults: auto (the model's), vllm (none) or a path.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
TensorParallel = Annotated[
    int, typer.Option("--tensor-parallel-size", "--tp", help="Processes, and GPUs if any, to shard the model over.")
]
DataParallel = Annotated[
    int,
    typer.Option("--data-parallel-size", "-dp", help="Engines with GPUs of their own, behind one address."),
]
MaxModelLen = Annotated[int | None, typer.Option(help="Maximum prompt plus output, in tokens.")]
MaxNumSeqs = Annotated[int, typer.Option(help="Maximum sequences that run at the same time.")]
MaxNumBatchedTokens = Annotated[
    int | None, typer.Option(help="Maximum tokens of one step.", show_default="2048; 8192 on a GPU of 32 GiB or more")
]
EnforceEager = Annotated[
    bool, typer.Option("--enforce-eager", help="Neither compile the model nor replay steps from CUDA graphs.")
]
WarmUp = Annotated[
    bool | None,
    typer.Option("--warm-up/--no-warm-up", help="Compile and capture before requests come.", show_default="on a GPU"),
]
EngineSeed = Annotated[int, typer.Option(help="Default sampling seed.")]
KVTokens = Annotated[int | None, typer.Option("--kv-tokens", help="Slots of the KV pool.")]
DrainTimeout = Annotated[
    float,
    typer.Option(
        "--shutdown-timeout", "--drain-timeout", help="Seconds after SIGTERM in which open requests may still end."
    ),
]
InputFile = Annotated[
    Path | None,
    typer.Option("--file", "-f", exists=True, dir_okay=False, help="Prompts, a line each."),
]


@app.callback()
def main() -> None:
    """Exact language-model serving in which a shared prefix is stored, computed and read once."""
    wait_without_spinning()


@app.command()
def demo(
    model: Model = DEFAULT_MODEL,
    max_tokens: MaxTokens = 40,
) -> None:
    """Serve a burst of overlapping requests, and show what sharing saved."""
    from radixgen.demo import run

    with _errors():
        run(model, max_tokens)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; else --file or stdin.")] = None,
    model: Model = DEFAULT_MODEL,
    file: InputFile = None,
    n: Annotated[int, typer.Option(help="Sequences of each prompt.")] = 1,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    json_schema: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="A JSON schema.")] = None,
    regex: Annotated[str | None, typer.Option(help="What each output must match.")] = None,
    choice: Annotated[list[str] | None, typer.Option(help="What an output may be; once for each.")] = None,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    tp: TensorParallel = 1,
    kv_tokens: KVTokens = None,
) -> None:
    """Serve prompts as one burst; write one JSON line for each, in their order.

    A line of --file or of standard input is the prompt's text, or a JSON object with "prompt" (text or token
    ids) or "messages" (and "tools").
    """
    from rich.progress import Progress

    from radixgen.engine import Engine

    with _errors():
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            json_schema=_read(json_schema) if json_schema else None,
            regex=regex,
            choice=choice or None,
        )
        requests = list(_requests(prompts, file))
        with waiting(Console(stderr=True)) as say:
            announce_loading(say, model)
            engine = Engine(
                model,
                load_format=load_format,
                dtype=dtype,
                device=device,
                tensor_parallel_size=tp,
                kv_tokens=kv_tokens,
                warm_up=False,
            )
        with engine:
            asked = [
                engine.chat_tokens(one["messages"], one.get("tools")) if "messages" in one else one["prompt"]
                for one in requests
            ]
            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("generating", total=len(asked))
                each = [engine.inputs.for_chat(params) if "messages" in one else params for one in requests]
                outputs = engine.generate(asked, each, progress=lambda done, _: bar.update(task, completed=done))
        for request, output in zip(requests, outputs, strict=True):
            line = {
                "id": request.get("id", output.request_id),
                "num_prompt_tokens": output.num_prompt_tokens,
                "num_cached_tokens": output.num_cached_tokens,
                "num_shared_tokens": output.num_shared_tokens,
                "sharing_ended": output.sharing_ended and asdict(output.sharing_ended),
                "outputs": [asdict(one) for one in output.outputs],
            }
            print(json.dumps(line, ensure_ascii=False))


@app.command()
def chat(
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    tp: TensorParallel = 1,
    kv_tokens: KVTokens = None,
) -> None:
    """Talk to a model; what was said before is found in the cache, token for token."""
    from radixgen.engine import Engine

    console = Console()
    with _errors():
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        with waiting(Console(stderr=True)) as say:
            announce_loading(say, model)
            engine = Engine(
                model, dtype=dtype, device=device, tensor_parallel_size=tp, kv_tokens=kv_tokens, warm_up=False
            )
        with engine, engine.conversation(system, params=params) as talk:
            while (said := _ask(console)) is not None:
                with talk.stream(said) as answer:
                    for delta in answer:
                        console.print(delta.outputs[0].text, end="", markup=False, highlight=False)
                cached, asked = delta.num_cached_tokens, delta.num_prompt_tokens
                console.print(f"\n[dim]{cached} of {asked} prompt tokens were cached[/]")


@app.command()
def serve(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="As --model.")] = None,
    model: Model = DEFAULT_MODEL,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others reach needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 is any that is free.")] = 8000,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    tp: TensorParallel = 1,
    data_parallel_size: DataParallel = 1,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = DEFAULT_LIMITS.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_tokens: KVTokens = None,
    enforce_eager: EnforceEager = False,
    warm_up: WarmUp = None,
    seed: EngineSeed = 0,
    generation_config: GenerationConfig = "auto",
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What requests call the model; once for each name.")
    ] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="A caller's API key, once for each; also RADIXGEN_API_KEY.")
    ] = None,
    operator_key: Annotated[
        list[str] | None,
        typer.Option(help="An operator's API key, for routes that concern all callers; once for each."),
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Maximum waiting sequences; beyond, requests get 429.")] = 1024,
    max_concurrency_per_key: Annotated[
        int | None, typer.Option(help="Maximum sequences of one API key; half of all if there are several keys.")
    ] = None,
    request_timeout: Annotated[float | None, typer.Option(help="Seconds after which a request is aborted.")] = None,
    stall_timeout: Annotated[float, typer.Option(help="Seconds without progress after which /health fails.")] = 60,
    timeout_keep_alive: Annotated[int, typer.Option(help="Seconds until an idle connection is closed.")] = 30,
    shutdown_delay: Annotated[
        float, typer.Option(help="Seconds after SIGTERM in which requests are still accepted, /ready at 503.")
    ] = 1,
    drain_timeout: DrainTimeout = 30,
    allowed_origins: Annotated[
        list[str] | None, typer.Option(help="Allowed CORS origin, once for each; * is any.")
    ] = None,
    allowed_methods: Annotated[
        list[str] | None, typer.Option(help="Allowed CORS method, once for each; all by default.")
    ] = None,
    allowed_headers: Annotated[
        list[str] | None, typer.Option(help="Allowed CORS request header, once for each; all by default.")
    ] = None,
    allow_credentials: Annotated[
        bool, typer.Option("--allow-credentials", help="Allow credentials in CORS requests.")
    ] = False,
    allowed_hosts: Annotated[
        list[str] | None, typer.Option(help="Accepted Host, once for each; *.example.com is every name below it.")
    ] = None,
    root_path: Annotated[str, typer.Option(help="Path prefix that a proxy puts in front of every route.")] = "",
    uds: Annotated[str | None, typer.Option(help="Unix socket to listen on, in place of --host and --port.")] = None,
    ssl_keyfile: Annotated[str | None, typer.Option(help="Private key for HTTPS, PEM.")] = None,
    ssl_certfile: Annotated[str | None, typer.Option(help="Certificate for HTTPS, PEM.")] = None,
    ssl_ca_certs: Annotated[str | None, typer.Option(help="CA certificates for those of clients, PEM.")] = None,
    ssl_cert_reqs: Annotated[int, typer.Option(help="Client certificates: 0 none, 1 optional, 2 required.")] = 0,
    ssl_ciphers: Annotated[str | None, typer.Option(help="Cipher suites of TLS 1.2, as OpenSSL lists them.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="Chat template in place of the model's: a file, or the text in one line.")
    ] = None,
    ignore_unknown_fields: Annotated[
        bool, typer.Option("--ignore-unknown-fields", help="Ignore fields that are not served, with a warning.")
    ] = False,
    metrics_compat: Annotated[str | None, typer.Option(help="vllm: add vLLM's names to /metrics.")] = None,
    access_log: Annotated[bool, typer.Option(help="Log a line for each request.")] = True,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
    zmq: Annotated[
        str | None, typer.Option(help="Serve by workers that connect to this ipc:// or tcp:// address.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Workers to wait for, with --zmq.")] = 1,
) -> None:
    """Serve a model over HTTP, to clients of OpenAI's API."""
    from radixgen.core.settings import api_keys

    with _errors():
        if zmq is not None:
            _refuse_given(context, _ENGINE_OPTIONS, "workers have the model: give it to `radixgen worker`")
            _refuse_given(context, ["data_parallel_size"], "starts its own workers: with --zmq say --workers")
        else:
            _refuse_given(context, ["workers"], "goes with --zmq")
        _require_extra("serve", "fastapi", "uvicorn", "prometheus_client")
        from radixgen.async_engine import AsyncEngine
        from radixgen.engine import Engine
        from radixgen.model.sampling_defaults import sampling_defaults
        from radixgen.serve.http import server
        from radixgen.serve.http.app import ServeOptions
        from radixgen.serve.http.backend import Backend
        from radixgen.serve.http.binding import Binding
        from radixgen.serve.http.custom_template import tokenizer_with_template
        from radixgen.serve.http.origins import OriginPolicy, parse_list
        from radixgen.serve.http.workers import connect, start
        from radixgen.serve.replicas import ReplicaOptions

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
            sizes = {
                "model": name or model,
                "dtype": dtype,
                "max_model_len": max_model_len,
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": max_num_batched_tokens,
                "kv_tokens": kv_tokens,
                "enforce_eager": enforce_eager,
                "warm_up": warm_up,
                "no_warm_up": warm_up is False,
                "seed": seed,
            }
            replicas = ReplicaOptions(data_parallel_size, tp, device, _flags(sizes))
            replicas.environments()
        options.check()
        binding.check([*options.api_keys, *options.operator_keys])
        with waiting(Console(stderr=True)) as say:
            announce_loading(say, name or model)
            options = replace(options, sampling_defaults=sampling_defaults(name or model, generation_config))
            tokenizer = None if chat_template is None else tokenizer_with_template(name or model, chat_template)
            backend: Backend
            if zmq is not None:
                backend = connect(zmq, model=name or model, tokenizer=tokenizer, workers=workers, limits=limits)
            elif replicas is not None:
                backend = start(replicas, model=name or model, tokenizer=tokenizer, limits=limits)
            else:
                engine = Engine(
                    name or model,
                    warm_up=False,
                    tokenizer=tokenizer,
                    load_format=load_format,
                    dtype=dtype,
                    device=device,
                    tensor_parallel_size=tp,
                    max_model_len=max_model_len,
                    max_step_tokens=max_num_batched_tokens,
                    kv_tokens=kv_tokens,
                    enforce_eager=enforce_eager,
                    seed=seed,
                    limits=limits,
                )
                options = replace(options, warm_up=engine.runs_on_gpu if warm_up is None else warm_up)
                backend = AsyncEngine(engine)
        server.serve(backend, options, binding)


@app.command()
def tree(
    file: Annotated[Path | None, typer.Argument(exists=True, dir_okay=False)] = None,
    model: Model = DEFAULT_MODEL,
) -> None:
    """Draw the tree that prompts make, with a tokenizer alone.

    A line of FILE or of standard input is the prompt's text, or a JSON object with "prompt" (text or token ids)
    or "messages" (and "tools").
    """
    from radixgen.cache import ExtentPool, RadixTree
    from radixgen.input_processor import chat_tokens
    from radixgen.model.loader import load_tokenizer
    from radixgen.tree_view import picture, snapshot

    with _errors():
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise InvalidRequest("model", model, "has no tokenizer")
        radix = RadixTree(ExtentPool(1))
        submitted = 0
        locks = []
        for request in _requests(None, file):
            if "messages" in request:
                tokens = chat_tokens(tokenizer, request["messages"], request.get("tools"))
            else:
                prompt = request["prompt"]
                tokens = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            submitted += len(tokens)
            locks.append(radix.insert(tokens))
        console = Console()
        console.print(picture(snapshot(radix, tokenizer.decode)))
        distinct = sum(node.known for node in radix.nodes())
        console.print(
            f"{len(locks)} prompts, {submitted} tokens, {distinct} distinct, "
            f"{radix.num_nodes} nodes: {submitted / max(distinct, 1):.2f}× shared"
        )


@app.command()
def explain(
    file: Annotated[Path | None, typer.Argument(exists=True, dir_okay=False)] = None,
    model: Model = DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Write one JSON object.")] = False,
) -> None:
    """Say what keeps the prompts of a log from being shared, and what it costs; a tokenizer is all that it takes.

    A line of FILE or of standard input is the prompt's text, or a JSON object with "prompt" (text or token ids)
    or "messages" (and "tools"). What is said to be saved was counted: on the same prompts, with the varying text
    moved to their end, or where white space or order is all that differs, made the same. Line numbers are those of
    the rendered prompt: the chat template's own lines count.
    """
    from radixgen.explain import BLANK, Written, explain
    from radixgen.explain.show import shown
    from radixgen.input_processor import chat_text
    from radixgen.model.loader import load_tokenizer

    with _errors():
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise InvalidRequest("model", model, "has no tokenizer")
        prompts: list[Written | list[int]] = []
        templates: dict[tuple[str, ...], Written] = {}
        for request in _requests(None, file):
            if "messages" in request:
                messages = request["messages"]
                prompts.append(Written(chat_text(tokenizer, messages, request.get("tools")), special=False))
                roles = tuple(str(one.get("role")) for one in messages)
                if roles not in templates:
                    blank = [{"role": role, "content": BLANK} for role in roles]
                    with suppress(InvalidRequest):
                        templates[roles] = Written(chat_text(tokenizer, blank), special=False)
            else:
                prompt = request["prompt"]
                prompts.append(Written(prompt) if isinstance(prompt, str) else prompt)
        with waiting(Console(stderr=True)) as say:
            say(f"comparing {len(prompts):,} prompts")
            report = explain(prompts, tokenizer, list(templates.values()))
        if as_json:
            print(json.dumps(report.as_dict(), ensure_ascii=False))
        else:
            Console().print(*shown(report, tokenizer.decode), sep="\n")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def worker(
    context: typer.Context,
    model: Model = DEFAULT_MODEL,
    backend: Annotated[
        str, typer.Option(help="zmq: vLLM's protocol. dynamo: NVIDIA Dynamo, which has further options.")
    ] = "zmq",
    handshake: Annotated[
        list[str] | None, typer.Option(help="A front end's ipc:// or tcp:// address; once for each.")
    ] = None,
    smg: Annotated[str | None, typer.Option(help="The ipc:// address that SMG has in --worker-urls.")] = None,
    engine_index: Annotated[int, typer.Option(help="Index of this worker, unique per front end.")] = 0,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    device: Device = "auto",
    tp: TensorParallel = 1,
    max_model_len: MaxModelLen = None,
    max_num_seqs: MaxNumSeqs = DEFAULT_LIMITS.max_num_seqs,
    max_num_batched_tokens: MaxNumBatchedTokens = None,
    kv_tokens: KVTokens = None,
    enforce_eager: EnforceEager = False,
    warm_up: WarmUp = None,
    seed: EngineSeed = 0,
    kv_events_config: Annotated[str | None, typer.Option(help="Publish cache events: vLLM's JSON; zmq only.")] = None,
    curve_secret: Annotated[Path | None, typer.Option(exists=True, help="Own CURVE keys, for TCP.")] = None,
    curve_server: Annotated[Path | None, typer.Option(exists=True, help="The front end's public key.")] = None,
    allow_insecure_tcp: Annotated[bool, typer.Option(help="Allow TCP without keys, to whoever reaches it.")] = False,
    drain_timeout: DrainTimeout = 25.0,
    stall_timeout: Annotated[float, typer.Option(help="Seconds without progress after which it is unhealthy.")] = 60.0,
    parent_fd: Annotated[int | None, typer.Option(hidden=True, help="A pipe; ends when it is closed.")] = None,
) -> None:
    """Serve a model to SMG, NVIDIA Dynamo or radixgen.Client. SIGTERM drains; a second one stops at once."""
    sizes = {
        "load_format": load_format,
        "dtype": dtype,
        "device": device,
        "tensor_parallel_size": tp,
        "max_model_len": max_model_len,
        "kv_tokens": kv_tokens,
        "enforce_eager": enforce_eager,
        "seed": seed,
    }
    step_sizes = {"max_num_seqs": max_num_seqs, "max_num_batched_tokens": max_num_batched_tokens}
    with _errors():
        if backend == "dynamo":
            alone = {
                "handshake": handshake,
                "smg": smg,
                "engine_index": engine_index,
                "kv_events_config": kv_events_config,
                "curve_secret": curve_secret,
                "curve_server": curve_server,
                "allow_insecure_tcp": allow_insecure_tcp,
            }
            for field, value in alone.items():
                if value:
                    raise InvalidRequest(field, value, "goes with --backend zmq")
            warm = {"warm_up": warm_up, "no_warm_up": warm_up is False}
            _serve_dynamo({"model": model, "drain_timeout": drain_timeout} | sizes | step_sizes | warm, context.args)
            return
        if backend != "zmq":
            raise InvalidRequest("backend", backend, "must be zmq or dynamo")
        if context.args:
            raise typer.BadParameter(f"No such option or argument: {context.args[0]}")
        import logging

        from radixgen.serve.launch import serve

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

        def load() -> "Engine":
            from radixgen.engine import Engine
            from radixgen.warm_up import announce_warm_up

            limits = Limits(max_num_seqs=max_num_seqs)
            alone = None if parent_fd is None else False  # several on one terminal: no spinners
            with waiting(Console(stderr=True, force_terminal=alone)) as say:
                announce_loading(say, model)
                engine = Engine(
                    model,
                    max_step_tokens=max_num_batched_tokens,
                    limits=limits,
                    warm_up=False,
                    **sizes,  # type: ignore[arg-type]
                )
                if engine.runs_on_gpu if warm_up is None else warm_up:
                    engine.warm_up(announce_warm_up(say))
                return engine

        drained = serve(
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


@app.command()
def doctor() -> None:
    """Print versions, devices, which attention backends are used and why, and cache paths."""
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
        table.add_row(f"extra {extra}", ", ".join(map(_version, packages)))
    device = resolve_device("auto")
    table.add_row("device", f"{device}{'' if torch.cuda.is_available() else ': PyTorch sees no CUDA device'}")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        table.add_row(f"cuda:{index}", f"{name}, {free >> 20:,} of {total >> 20:,} MiB free")
    for name in BACKENDS:
        table.add_row(f"attention: {name}", _why(name, device))
    table.add_row("flash-attn", installed())
    try:
        table.add_row("cache", str(cache_dir()))
    except FileNotFoundError as error:
        table.add_row("cache", str(error))
    Console().print(table)


_EXTRAS = {"structured": ["llguidance"], "serve": ["fastapi", "uvicorn", "prometheus-client"]}


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} is not installed"


def _why(name: str, device: "torch.device") -> str:
    """Whether a backend is used where none is asked for, and if not, why."""
    from radixgen.kernels.backend import backend

    chosen = backend("auto", device).name
    if name == chosen:
        return "used: the fastest that runs here"
    try:
        backend(name, device)
    except InvalidRequest as error:
        return f"not used: {error.limit}"
    if name == "flash":
        return f"not used unless asked for, or where a calibration says that it answers sooner than {chosen}"
    return f"not used unless asked for: {chosen} is faster here"


def _serve_dynamo(options: dict[str, Any], further: list[str]) -> None:
    """Under Dynamo's own worker, which returns when that ends. further: options that are its alone."""
    try:
        from radixgen.serve.dynamo import main
    except ModuleNotFoundError as error:
        raise InvalidRequest("backend", "dynamo", "needs pip install 'radixgen[dynamo]'") from error
    main([*_flags(options), *further])


def _flags(options: dict[str, Any]) -> list[str]:
    """Options as on a command line: without those that are None or False."""
    flags = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            flags.append(flag)
        elif value is not None and value is not False:
            flags.append(f"{flag}={value}")
    return flags


def _requests(prompts: list[str] | None, file: Path | None) -> Iterator[dict[str, Any]]:
    """One object a prompt, from the arguments, a file or standard input."""
    if prompts:
        yield from ({"prompt": prompt} for prompt in prompts)
        return
    # Not splitlines(): it also parts at U+2028 and its kin, which a JSON string may hold as they are.
    for number, line in enumerate(_read(file).split("\n"), 1):
        if not line.strip():
            continue
        if not line.lstrip().startswith(("{", "[", '"')):
            yield {"prompt": line}
            continue
        try:
            request = json.loads(line)
        except (ValueError, RecursionError) as error:
            if line.lstrip().startswith("{"):
                raise InvalidRequest(f"line {number}", line, f"is not JSON: {error}") from error
            yield {"prompt": line}
            continue
        if fault := _fault(request):
            raise InvalidRequest(f"line {number}", line, fault)
        check_texts(f"line {number}", request)
        yield request


def _read(file: Path | None) -> str:
    try:
        return file.read_text(encoding="utf-8-sig") if file else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequest("file", str(file or "stdin"), f"is not text: {error}") from error


def _fault(request: Any) -> str | None:
    """What is wrong with what a line holds as JSON, if anything."""
    if not isinstance(request, dict):
        return 'must be text that is not JSON, or an object: {"prompt": …} or {"messages": […]}'
    if ("prompt" in request) == ("messages" in request):
        return 'must hold "prompt" or "messages"'
    if "messages" in request:
        messages = request["messages"]
        good = isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages)
        return None if good else '"messages" must be a list of objects'
    prompt = request["prompt"]
    ids = isinstance(prompt, list) and all(type(token) is int and 0 <= token < 2**31 for token in prompt)
    return None if ids or isinstance(prompt, str) else '"prompt" must be text or a list of token ids'


def _ask(console: Console) -> str | None:
    try:
        return console.input("[bold cyan]> [/]")
    except (EOFError, KeyboardInterrupt):
        return None


def _require_extra(extra: str, *modules: str) -> None:
    """That the packages of an optional part are there."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise RadixgenError(f"{', '.join(missing)} not installed: pip install 'radixgen[{extra}]'")


_ENGINE_OPTIONS = [
    "load_format",
    "dtype",
    "device",
    "tp",
    "max_model_len",
    "max_num_batched_tokens",
    "kv_tokens",
    "enforce_eager",
    "warm_up",
    "seed",
]
"""Of `serve`, those that only an engine in this process can obey"""


def _refuse_given(context: typer.Context, names: Iterable[str], why: str) -> None:
    """Raise `InvalidRequest` for the first of these options that is on the command line."""
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidRequest(name, context.params[name], why)


class _errors:  # noqa: N801
    """Say radixgen's own errors in one line, and exit 1."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, RadixgenError):
            line = Text.assemble((type(error).__name__, "red"), " ", " ".join(str(error).split()))
            Console(stderr=True).print(line, soft_wrap=True)
            raise typer.Exit(1) from error
