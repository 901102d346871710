"""Replicas of one model: workers in processes of their own, a GPU each, that `serve --data-parallel-size` starts.

Each is `radixgen worker` for the front end of this process. It holds one end of a pipe and ends when the other one is
closed, so that none outlives this process, however that ends.
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
"""For a replica to end, when it is asked to"""


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """How many replicas of a model there are, and how each is made.

    count: of replicas.
    ranks: processes that each shards its model over, with a GPU each if there are any.
    device: `auto`, `cuda` or `cpu`.
    worker: further options of `radixgen worker`, as on its command line.
    """

    count: int
    ranks: int = 1
    device: str = "auto"
    worker: Sequence[str] = field(default=())

    def environments(self) -> list[dict[str, str]]:
        """Of each replica, which sees its own GPUs alone. Raises `InvalidRequest`."""
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
        """What starts one, to dial `handshake`; it publishes its cache events in the same folder."""
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
    """Processes that end with this one, watched until then. One that dies is not started again."""

    def __init__(
        self,
        commands: Sequence[Sequence[str]],
        environments: Sequence[Mapping[str, str]],
        on_death: Callable[[str], None],
    ) -> None:
        """Start them; each command gets `--parent-fd FD` at its end.

        on_death: is told, from a thread, of each that ends before `close`: which one, and how.
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
        """End them, and wait until they have. May be called twice."""
        self._closing = True
        for process in self.processes:
            process.terminate()
        for index, process in enumerate(self.processes):
            try:
                process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                logger.error("replica %d does not end, and is killed", index)
                process.kill()
                process.wait()
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1

    def _start(self, command: Sequence[str], environment: Mapping[str, str], pipe: int) -> None:
        """In a session of its own, for a terminal's signals are for this process, which decides when they end."""
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
