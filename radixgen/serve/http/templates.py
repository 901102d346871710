"""Rendering of chat templates in a separate process (`template_process`), limited in time, memory and length."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from radixgen.core import EngineClosed, InvalidRequest, PromptTooLong
from radixgen.engine.input_processor import through_template
from radixgen.serve.http.template_process import CPU_SECONDS, MEMORY_BYTES, receive, send

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_WALL_SECONDS = 60.0
"""Timeout for a busy machine; renders are limited by their processor time"""


class TemplateRenderer:
    """Renders chat templates with input of untrusted callers. Thread-safe.

    A tokenizer that overrides `apply_chat_template`, without a Jinja template, renders in this process.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | None", most_chars: int) -> None:
        """
        tokenizer: its templates are compiled in advance.
        most_chars: maximum length of a rendered text, in characters.
        """
        template = None if tokenizer is None else tokenizer.chat_template
        self._templates = [*template.values()] if isinstance(template, dict) else [template] if template else []
        self._most_chars = most_chars
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._closed = False

    def start(self) -> None:
        """Start the process, which takes about a second, if there are templates."""
        if self._templates:
            with self._lock:
                self._ensure_process()

    def __call__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: list[Any] | None,
        tokenize: bool = False,
        **variables: Any,
    ) -> str:
        """Render as `through_template`.

        Raises `InvalidRequest` if the template raises an error or exceeds a limit, `EngineClosed` after `close`.
        """
        assert not tokenize
        if not _is_jinja(tokenizer):
            text = str(through_template(tokenizer, messages, tools=tools, tokenize=False, **variables))
            answer: dict[str, Any] = {"text": text} if len(text) <= self._most_chars else {"length": len(text)}
        else:
            answer = self._ask(
                {
                    "template": tokenizer.get_chat_template(tools=tools),
                    "messages": [
                        {name: value for name, value in message.items() if value is not None} for message in messages
                    ],
                    "tools": tools,
                    "variables": tokenizer.special_tokens_map | variables,
                    "most_chars": self._most_chars,
                }
            )
        if "length" in answer:
            raise PromptTooLong("len(messages)", answer["length"], f"at most {self._most_chars} characters")
        if "error" in answer:
            raise InvalidRequest("messages", messages, f"the chat template refuses them: {answer['error']}")
        return str(answer["text"])

    def close(self) -> None:
        """End the process and every render. May be called twice."""
        with self._lock:
            self._closed = True
            self._stop()

    def _ask(self, request: object) -> dict[str, Any]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._hand_over(theirs)
            ours.settimeout(_WALL_SECONDS)
            try:
                with ours.makefile("rwb") as stream:
                    send(stream, request)
                    answer: dict[str, Any] = receive(stream)
            except (OSError, EOFError):
                raise self._unanswered() from None
        return answer

    def _hand_over(self, connection: socket.socket) -> None:
        """Send a socket to the process, and close it here."""
        with self._lock:
            control = self._ensure_process()
            with suppress(OSError):  # the reader notices
                socket.send_fds(control, [b"r"], [connection.fileno()])
        connection.close()

    def _unanswered(self) -> Exception:
        if self._closed:
            return EngineClosed("the server is closed")
        limit = f"the chat template takes more than {CPU_SECONDS} s or {MEMORY_BYTES >> 20} MiB to render them"
        return InvalidRequest("messages", "…", limit)

    def _ensure_process(self) -> socket.socket:
        if self._closed:
            raise EngineClosed("the server is closed")
        if self._process is not None and self._process.poll() is not None:
            logger.warning("the process that renders chat templates has died; starting another")
            self._stop()
        if self._process is None or self._control is None:
            self._control, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", "radixgen.serve.http.template_process", str(theirs.fileno())]
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], start_new_session=True
                )
            assert self._process.stdin is not None
            with suppress(OSError), self._process.stdin as stream:  # it has died already; the reader notices
                stream.write(json.dumps(self._templates).encode())
        return self._control

    def _stop(self) -> None:
        if self._process is None or self._control is None:
            return
        self._control.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = self._control = None


def _is_jinja(tokenizer: "PreTrainedTokenizerBase") -> bool:
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template
