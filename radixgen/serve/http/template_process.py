"""A process that renders chat templates, each render in a fork of its own that the kernel ends where it takes too much.

Templates are programs: a loop that writes nothing, or one multiplication, can take any time and any memory, and no
thread can be ended. What it needs is imported once; a fork takes about a millisecond.
"""

import json
import os
import resource
import signal
import socket
import sys
from contextlib import suppress
from io import BufferedRWPair
from pathlib import Path
from typing import Any

CPU_SECONDS = 2
"""Of one render"""
MEMORY_BYTES = 1 << 29
"""Of one render, above what the process has before it"""
_LENGTH_BYTES = 8
_NICE = 5


def main(descriptor: int) -> None:
    """Render for every socket that comes over this one, until that is closed. Templates on stdin, a JSON list, are
    compiled before.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    for template in json.load(sys.stdin):
        with suppress(Exception):  # a render says what is wrong with it
            render_jinja_template(conversations=[], chat_template=template)
    for number in (signal.SIGINT, signal.SIGTERM):  # a group's signals are for the server
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control = socket.socket(fileno=descriptor)
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        with suppress(OSError):  # too many processes: the server reads an end
            if os.fork() == 0:
                _serve_one(control, descriptors[0])
        os.close(descriptors[0])


def send(stream: BufferedRWPair, value: object) -> None:
    """Write `value` as JSON behind its length. Raises OSError."""
    data = json.dumps(value).encode()
    stream.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
    stream.flush()


def receive(stream: BufferedRWPair) -> Any:
    """What `send` wrote. Raises OSError, and EOFError where less came."""
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "big")
    data = stream.read(length)
    if not length or len(data) < length:
        raise EOFError
    return json.loads(data)


def _serve_one(control: socket.socket, descriptor: int) -> None:
    """In the fork; it never returns."""
    status = 1
    try:
        control.close()
        os.nice(_NICE)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        memory = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        with socket.socket(fileno=descriptor) as connection, connection.makefile("rwb") as stream:
            send(stream, _render(**receive(stream)))
        status = 0
    finally:
        os._exit(status)


def _render(
    template: str, messages: list[Any], tools: list[Any] | None, variables: dict[str, Any], most_chars: int
) -> dict[str, Any]:
    """`{"text": …}`, or `{"error": …}` in the template's words, or `{"length": …}` of a text that is too long."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        (text,), _ = render_jinja_template(
            conversations=[messages], tools=tools, chat_template=template, add_generation_prompt=True, **variables
        )
    except Exception as error:
        reason = str(error) if isinstance(error, TemplateError) else repr(error)
        return {"error": reason[:1_000]}
    return {"text": text} if len(text) <= most_chars else {"length": len(text)}


if __name__ == "__main__":
    main(int(sys.argv[1]))
