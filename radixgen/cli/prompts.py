"""Prompts as users write them: arguments, or lines of a file or of standard input."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from radixgen.core import InvalidRequest, check_texts
from radixgen.core.reading import ReadingPolicy, reading_from_json


def read_requests(prompts: list[str] | None, file: Path | None) -> Iterator[dict[str, Any]]:
    """Yield a dict with `prompt` or `messages` for each argument, or for each line of a file or of standard input.

    Raises `InvalidRequest` for a line that is neither text nor such an object.
    """
    if prompts:
        yield from ({"prompt": prompt} for prompt in prompts)
        return
    # splitlines() also splits at U+2028 and U+2029, which JSON strings may contain unescaped.
    for number, line in enumerate(read_text(file).split("\n"), 1):
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
        if fault := _find_fault(request):
            raise InvalidRequest(f"line {number}", line, fault)
        check_texts(f"line {number}", request)
        yield request


def read_text(file: Path | None) -> str:
    """Text of a file, or of standard input. Raises `InvalidRequest` if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig") if file else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise InvalidRequest("file", str(file or "stdin"), f"is not text: {error}") from error


def read_reading(text: str) -> ReadingPolicy:
    """Reading policy of a JSON object. Raises `InvalidRequest`."""
    try:
        return reading_from_json(json.loads(text))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidRequest("reading", text, f"is not JSON: {error}") from error


def _find_fault(request: Any) -> str | None:
    """Why a line of JSON is not a request, or None if it is."""
    if not isinstance(request, dict):
        return 'must be plain text, or an object {"prompt": …} or {"messages": […]}'
    if ("prompt" in request) == ("messages" in request):
        return 'must hold either "prompt" or "messages"'
    if "messages" in request:
        messages = request["messages"]
        valid = isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages)
        return None if valid else '"messages" must be a list of objects'
    prompt = request["prompt"]
    ids = isinstance(prompt, list) and all(type(token) is int and 0 <= token < 2**31 for token in prompt)
    return None if ids or isinstance(prompt, str) else '"prompt" must be text or a list of token ids'
