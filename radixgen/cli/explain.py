"""`radixgen explain`."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType

from radixgen.cli.errors import report_errors
from radixgen.cli.options import DEFAULT_MODEL, Device, Dtype, Model, PromptFile, Reading, reject_options
from radixgen.cli.prompts import read_reading, read_requests
from radixgen.core import InvalidRequest
from radixgen.core.reading import ReadingPolicy
from radixgen.progress import announce_loading, waiting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Requests = list[dict[str, Any]]
_Output = tuple[dict[str, Any], Iterator[RenderableType]]
"""A report as JSON, and as parts to print"""


def explain(
    context: typer.Context,
    file: PromptFile = None,
    model: Model = DEFAULT_MODEL,
    reading: Reading = None,
    max_prompts: Annotated[int, typer.Option(help="Number of prompts that --reading measures.")] = 8,
    rows: Annotated[int, typer.Option(help="Number of rows of each prompt that --reading measures.")] = 16,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Report what keeps logged prompts from sharing prefixes, and what it costs; loads the tokenizer only.

    A line of FILE or of standard input is plain text, or a JSON object with "prompt" (text or token ids) or
    "messages" (and optionally "tools"). Savings assume an edit: varying text moved to the end, or white
    space and order made equal. Line numbers are those of the rendered prompt, so the chat template's own lines count.

    With --reading, report instead which share of attention a reading policy would leave unread; this loads the model,
    and computes prompts and short answers.
    """
    with report_errors():
        if reading is None:
            reject_options(context, ("max_prompts", "rows", "dtype", "device"), "needs --reading")
            report, parts = _explain_sharing(list(read_requests(None, file)), model)
        else:
            policy = read_reading(reading)
            requests = list(read_requests(None, file))
            report, parts = _explain_reading(requests, model, policy, dtype, device, max_prompts=max_prompts, rows=rows)
        if as_json:
            print(json.dumps(report, ensure_ascii=False))
        else:
            Console().print(*parts, sep="\n")


def _explain_sharing(requests: _Requests, model: str) -> _Output:
    from radixgen.engine.input_processor import chat_text
    from radixgen.explain import BLANK, PromptText, explain
    from radixgen.explain.show import render_report
    from radixgen.model.loader import load_tokenizer

    tokenizer = _required(load_tokenizer(model), model)
    prompts: list[PromptText | list[int]] = []
    templates: dict[tuple[str, ...], PromptText] = {}
    for request in requests:
        if "messages" in request:
            messages = request["messages"]
            prompts.append(PromptText(chat_text(tokenizer, messages, request.get("tools")), special=False))
            roles = tuple(str(message.get("role")) for message in messages)
            if roles not in templates:
                blank = [{"role": role, "content": BLANK} for role in roles]
                with suppress(InvalidRequest):
                    templates[roles] = PromptText(chat_text(tokenizer, blank), special=False)
        else:
            prompt = request["prompt"]
            prompts.append(PromptText(prompt) if isinstance(prompt, str) else prompt)
    with waiting(Console(stderr=True)) as say:
        say(f"comparing {len(prompts):,} prompts")
        report = explain(prompts, tokenizer, list(templates.values()))
    return report.as_dict(), render_report(report, tokenizer.decode)


def _explain_reading(
    requests: _Requests, model: str, reading: ReadingPolicy, dtype: str, device: str, **sizes: int
) -> _Output:
    from radixgen.engine.input_processor import chat_tokens
    from radixgen.explain.reading import explain_reading
    from radixgen.explain.show import render_reading
    from radixgen.model.loader import load

    with waiting(Console(stderr=True)) as say:
        announce_loading(say, model)
        loaded = load(model, dtype, device)
        tokenizer = loaded.tokenizer
        prompts: list[list[int]] = []
        for request in requests:
            if "messages" in request:
                prompts.append(chat_tokens(tokenizer, request["messages"], request.get("tools")))
            elif isinstance(request["prompt"], str):
                prompts.append(_required(tokenizer, model)(request["prompt"], verbose=False)["input_ids"])
            else:
                prompts.append(request["prompt"])
        say(f"measuring {min(len(prompts), sizes['max_prompts']):,} prompts")
        report = explain_reading(prompts, loaded, reading, **sizes)
    return report.as_dict(), render_reading(report)


def _required(tokenizer: "PreTrainedTokenizerBase | None", model: str) -> "PreTrainedTokenizerBase":
    if tokenizer is None:
        raise InvalidRequest("model", model, "has no tokenizer")
    return tokenizer
