"""`radixgen generate`."""

import json
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from radixgen.cli.errors import report_errors
from radixgen.cli.options import (
    DEFAULT_KV_DIR_SIZE,
    DEFAULT_MODEL,
    Device,
    Dtype,
    KVCacheDtype,
    KVDir,
    KVDirSize,
    KVOffloadingSize,
    KVTokens,
    LoadFormat,
    MaxTokens,
    Model,
    Profile,
    ProfileSteps,
    Quantization,
    Reading,
    Seed,
    Temperature,
    TensorParallel,
    TopK,
    TopP,
    engine_arguments,
)
from radixgen.cli.prompts import read_reading, read_requests, read_text
from radixgen.core import SamplingParams
from radixgen.progress import announce_loading, waiting


def generate(
    context: typer.Context,
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts to complete. Read from --file or stdin if omitted.")
    ] = None,
    model: Model = DEFAULT_MODEL,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", exists=True, dir_okay=False, help="Prompts, one per line.")
    ] = None,
    n: Annotated[int, typer.Option(help="Number of completions per prompt.")] = 1,
    max_tokens: MaxTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    json_schema: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="File with a JSON schema that the output must match."),
    ] = None,
    regex: Annotated[str | None, typer.Option(help="Regular expression that the output must match.")] = None,
    choice: Annotated[
        list[str] | None, typer.Option(help="Restrict the output to one of these strings. Can be given multiple times.")
    ] = None,
    reading: Reading = None,
    load_format: LoadFormat = "auto",
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    kv_cache_dtype: KVCacheDtype = "auto",
    device: Device = "auto",
    tp: TensorParallel = 1,
    kv_tokens: KVTokens = None,
    kv_offloading_size: KVOffloadingSize = 0.0,
    kv_dir: KVDir = None,
    kv_dir_size: KVDirSize = DEFAULT_KV_DIR_SIZE,
    profile: Profile = None,
    profile_steps: ProfileSteps = 10,
) -> None:
    """Generate completions for a batch of prompts; print one JSON line per prompt, in order.

    A line of --file or of standard input is plain text, or a JSON object with "prompt" (text or token ids) or
    "messages" (and optionally "tools").
    """
    from rich.progress import Progress

    from radixgen.engine.engine import Engine
    from radixgen.engine.profiler import check_profile

    with report_errors():
        params = SamplingParams(
            n=n,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            json_schema=read_text(json_schema) if json_schema else None,
            regex=regex,
            choice=choice or None,
            reading=None if reading is None else read_reading(reading),
        )
        if profile is not None:
            check_profile(profile, profile_steps)
        requests = list(read_requests(prompts, file))
        with waiting(Console(stderr=True)) as say:
            announce_loading(say, model)
            engine = Engine(model, warm_up=False, **engine_arguments(context.params | {"seed": 0}))
        with engine, engine.profile(profile, profile_steps) if profile else nullcontext() as profiler:
            inputs = [
                engine.chat_tokens(request["messages"], request.get("tools"))
                if "messages" in request
                else request["prompt"]
                for request in requests
            ]
            each = [engine.inputs.for_chat(params) if "messages" in request else params for request in requests]
            with Progress(console=Console(stderr=True), transient=True) as bar:
                task = bar.add_task("generating", total=len(inputs))
                outputs = engine.generate(inputs, each, progress=lambda done, _: bar.update(task, completed=done))
        if profiler is not None and profiler.path is not None:
            Console(stderr=True).print(f"wrote the profile to {profiler.path}", soft_wrap=True, markup=False)
        for request, output in zip(requests, outputs, strict=True):
            line = {
                "id": request.get("id", output.request_id),
                "num_prompt_tokens": output.num_prompt_tokens,
                "num_cached_tokens": output.num_cached_tokens,
                "num_shared_tokens": output.num_shared_tokens,
                "exact": output.exact,
                "sharing_ended": output.sharing_ended and asdict(output.sharing_ended),
                "outputs": [asdict(completion) for completion in output.outputs],
            }
            print(json.dumps(line, ensure_ascii=False))
