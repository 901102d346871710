"""`radixgen chat`."""

from typing import Annotated

import typer
from rich.console import Console

from radixgen.cli.errors import report_errors
from radixgen.cli.options import (
    DEFAULT_MODEL,
    Device,
    Dtype,
    KVTokens,
    MaxTokens,
    Model,
    Quantization,
    Seed,
    Temperature,
    TensorParallel,
    TopK,
    TopP,
)
from radixgen.core import SamplingParams
from radixgen.progress import announce_loading, waiting


def chat(
    model: Model = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    top_k: TopK = 0,
    seed: Seed = None,
    dtype: Dtype = "auto",
    quantization: Quantization = None,
    device: Device = "auto",
    tp: TensorParallel = 1,
    kv_tokens: KVTokens = None,
) -> None:
    """Chat with a model in the terminal; earlier turns are reused from the KV cache."""
    from radixgen.engine.engine import Engine

    console = Console()
    with report_errors():
        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
        with waiting(Console(stderr=True)) as say:
            announce_loading(say, model)
            engine = Engine(
                model,
                dtype=dtype,
                quantization=quantization,
                device=device,
                tensor_parallel_size=tp,
                kv_tokens=kv_tokens,
                warm_up=False,
            )
        with engine, engine.conversation(system, params=params) as conversation:
            while (message := _read_message(console)) is not None:
                with conversation.stream(message) as answer:
                    for delta in answer:
                        console.print(delta.outputs[0].text, end="", markup=False, highlight=False)
                cached, total = delta.num_cached_tokens, delta.num_prompt_tokens
                console.print(f"\n[dim]{cached} of {total} prompt tokens were cached[/]")


def _read_message(console: Console) -> str | None:
    """The user's next message, or None at the end of the input."""
    try:
        return console.input("[bold cyan]> [/]")
    except (EOFError, KeyboardInterrupt):
        return None
