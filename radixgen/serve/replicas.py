"""Replicas of a model: worker processes that `serve --data-parallel-size` starts, each with its own GPUs.

Each is a `radixgen worker` that connects to the front end in this process. It holds one end of a pipe and exits when
the other end is closed, so that no replica outlives this process.
"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from radixgen.core import InvalidRequest, check_integer
from radixgen.core.settings import replica_environment, visible_gpus
from radixgen.model.loader import resolve_device
from radixgen.model.ranks import describe_exit

logger = logging.getLogger(__name__)

MAX_REPLICAS = 256
_STOP_SECONDS = 30.0
"""Time limit for a replica to exit after SIGTERM"""


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """Number of replicas, and the options of each.

    count: number of replicas.
    ranks: processes to shard each replica's model over, with one GPU each if there are any.
    device: `auto`, `cuda` or `cpu`.
    worker: further command-line arguments of `radixgen worker`.
    """

    count: int
    ranks: int = 1
    device: str = "auto"
    worker: Sequence[str] = field(default=())

    def environments(self) -> list[dict[str, str]]:
        """Environment variables of each replica, which sees only its own GPUs. Raises `InvalidRequest`."""
        check_integer("data_parallel_size", self.count, 1, MAX_REPLICAS)
        check_integer("tensor_parallel_size", self.ranks, 1, 1 << 16)
        chosen = resolve_device(self.device)
        if ":" in self.device:
            raise InvalidRequest("device", self.device, "must be auto, cpu or cuda: each replica has a GPU of its own")
        processes = self.count * self.ranks
        if chosen.type == "cpu":
            return [replica_environment((), processes) for _ in range(self.count)]
        gpus = visible_gpus(torch.cuda.device_count())
        if processes > len(gpus):
            needed = f"{self.count} × {self.ranks} GPUs" if self.ranks > 1 else f"{self.count} GPUs"
            raise InvalidRequest("data_parallel_size", self.count, f"needs {needed}, and {len(gpus)} are visible")
        own = [gpus[start : start + self.ranks] for start in range(0, processes, self.ranks)]
        return [replica_environment(names, processes) for names in own]

    def command(self, handshake: str, index: int) -> list[str]:
        """Command line of replica `index`, which connects to `handshake` and publishes KV cache events next to it."""
        folder = str(Path(handshake.removeprefix("ipc://")).parent)
        events = {
            "endpoint": f"ipc://{folder}/events-{index}",
            "replay_endpoint": f"ipc://{folder}/replay-{index}",
        }
        return [
            *(sys.executable, "-P", "-m", "radixgen", "worker", "--handshake", handshake),
            *("--engine-index", str(index), "--kv-events-config", json.dumps(events)),
            *(f"--tp={self.ranks}", f"--device={self.device}", *self.worker),
        ]


class Replicas:
    """Replica processes, which end with this process. One that dies is not restarted."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environments: Sequence[Mapping[str, str]],
        on_death: Callable[[str], None],
    ) -> None:
        """Start the processes; `--parent-fd FD` is appended to each command.

        on_death: called from a thread, with a description, for each process that ends before `close`.
        """
        self.processes: list[subprocess.Popen[bytes]] = []
        self._on_death = on_death
        self._closing = False
        read, self._pipe = os.pipe()
        try:
            for command, environment in zip(commands, environments, strict=True):
                self._start([*command, "--parent-fd", str(read)], environment, read)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(read)
        for index in range(len(self.processes)):
            name = f"radixgen-replica-{index}"
            threading.Thread(target=self._watch, args=(index,), name=name, daemon=True).start()

    def close(self) -> None:
        """Stop the processes and wait for them. May be called twice."""
        self._closing = True
        for process in self.processes:
            process.terminate()
        for index, process in enumerate(self.processes):
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                logger.error("replica %d does not exit and is killed", index)
                process.kill()
                process.wait()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def _start(self, command: Sequence[str], environment: Mapping[str, str], pipe: int) -> None:
        """Start a process in its own session, so that signals of the terminal reach only this process."""
        self.processes.append(
            subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[pipe],
                env=environment,
                start_new_session=True,
            )
        )

    def _watch(self, index: int) -> None:
        end = describe_exit(self.processes[index].wait())
        if not self._closing:
            self._on_death(f"replica {index} {end}")
