"""`radixgen explain`."""

import json
from contextlib import suppress
from typing import Annotated

import typer
from rich.console import Console

from radixgen.cli.errors import report_errors
from radixgen.cli.options import DEFAULT_MODEL, Model, PromptFile
from radixgen.cli.prompts import read_requests
from radixgen.core import InvalidRequest
from radixgen.progress import waiting


def explain(
    file: PromptFile = None,
    model: Model = DEFAULT_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Report what keeps logged prompts from sharing prefixes, and what it costs; loads the tokenizer only.

    A line of FILE or of standard input is plain text, or a JSON object with "prompt" (text or token ids) or
    "messages" (and optionally "tools"). Savings assume an edit: varying text moved to the end, or white
    space and order made equal. Line numbers are those of the rendered prompt, so the chat template's own lines count.
    """
    from radixgen.engine.input_processor import chat_text
    from radixgen.explain import BLANK, PromptText, explain
    from radixgen.explain.show import render_report
    from radixgen.model.loader import load_tokenizer

    with report_errors():
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise InvalidRequest("model", model, "has no tokenizer")
        prompts: list[PromptText | list[int]] = []
        templates: dict[tuple[str, ...], PromptText] = {}
        for request in read_requests(None, file):
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
        if as_json:
            print(json.dumps(report.as_dict(), ensure_ascii=False))
        else:
            Console().print(*render_report(report, tokenizer.decode), sep="\n")
