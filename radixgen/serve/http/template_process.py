"""Process that renders chat templates, each in a fork of its own with limits on processor time and memory.

Templates are programs: a loop or a single multiplication can take unlimited time and memory, and threads can't be
killed. Imports happen once; a fork takes about a millisecond.
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
"""Limit of one render"""
MEMORY_BYTES = 1 << 29
"""Limit of one render, in addition to the memory of the process"""
_LENGTH_BYTES = 8
_NICE = 5


def main(descriptor: int) -> None:
    """Render for each socket that is received over the socket `descriptor`, until that is closed.

    Templates from stdin, a JSON list, are compiled first.
    """
    from transformers.utils.chat_template_utils import render_jinja_template

    for template in json.load(sys.stdin):
        with suppress(Exception):  # rendering reports the error
            render_jinja_template(conversations=[], chat_template=template)
    for number in (signal.SIGINT, signal.SIGTERM):  # signals to the process group are meant for the server
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control = socket.socket(fileno=descriptor)
    while True:
        _, descriptors, _, _ = socket.recv_fds(control, 1, 1)
        if not descriptors:
            return
        with suppress(OSError):  # too many processes: the server reads the end of the stream
            if os.fork() == 0:
                _serve_request(control, descriptors[0])
        os.close(descriptors[0])


def send(stream: BufferedRWPair, value: object) -> None:
    """Write `value` as JSON, preceded by its length. Raises OSError."""
    data = json.dumps(value).encode()
    stream.write(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
    stream.flush()


def receive(stream: BufferedRWPair) -> Any:
    """Read a value that `send` wrote. Raises OSError, and EOFError if it is incomplete."""
    length = int.from_bytes(stream.read(_LENGTH_BYTES), "big")
    data = stream.read(length)
    if not length or len(data) < length:
        raise EOFError
    return json.loads(data)


def _serve_request(control: socket.socket, descriptor: int) -> None:
    """Render one template in the fork. Never returns."""
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
    """Result of a render: `{"text": …}`, `{"error": …}`, or `{"length": …}` of a text that is too long."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    variables = {"add_generation_prompt": True} | variables
    try:
        (text,), _ = render_jinja_template(conversations=[messages], tools=tools, chat_template=template, **variables)
    except Exception as error:
        reason = str(error) if isinstance(error, TemplateError) else repr(error)
        return {"error": reason[:1_000]}
    return {"text": text} if len(text) <= most_chars else {"length": len(text)}


if __name__ == "__main__":
    main(int(sys.argv[1]))
