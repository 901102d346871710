"""A contender in a process of its own: libraries that share a thread take each other's state of AMX tiles."""

import multiprocessing
from collections.abc import Callable
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any

import torch

from bench.contenders import Contender

OpenContender = Callable[[], AbstractContextManager[Contender]]


class EngineProcess:
    """Opens a contender and waits for calls. What goes there and comes back is pickled."""

    def __init__(self, open_contender: OpenContender, threads: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, open_contender, threads), daemon=True)
        self._process.start()
        theirs.close()

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of `function(contender, *arguments)`. Raises `EOFError` if the process has died."""
        self._connection.send((function, arguments))
        return self._connection.recv()

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, open_contender: OpenContender, threads: int) -> None:
    torch.set_num_threads(threads)
    with open_contender() as contender:
        while True:
            try:
                function, arguments = connection.recv()
            except EOFError:
                return
            connection.send(function(contender, *arguments))
