"""Protocol between the ranks of a sharded model, besides torch.distributed: frames on a socket or ring.

A frame is a length and bytes. Rank 0 sends commands with typed arrays, so that every rank runs the same step; the
others answer in JSON. Nothing received is executed.
"""

import itertools
import json
import socket
import struct
import weakref
from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, dataclass
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from radixgen.core import Plan
from radixgen.core.plan import NodeSummary

MAX_FRAME = 1 << 30
"""Maximum size of a frame in bytes."""
_LENGTH = struct.Struct("<Q")
_HEAD = struct.Struct("<BB6x")
_SHAPE = struct.Struct("<BB6xII")
_ALIGNMENT = 8
_DTYPES = tuple(np.dtype(name) for name in ("<i4", "<i8", "<f8"))

COLUMNS = (
    "row_positions",
    "row_order",
    "row_extra",
    "unit_rows",
    "unit_segments",
    "unit_rank",
    "unit_cost",
    "unit_blocks",
    "segment_starts",
    "segment_lengths",
    "segment_positions",
    "segment_rows",
    "segment_room",
    "growing",
    "path_rows",
)
"""The arrays of a `Plan` that are sent: all but those that only `explain` reads."""

Array = NDArray[Any]


class RankCommand(IntEnum):
    """Commands from rank 0 to the other ranks."""

    ALLOCATE = 1
    RUN = 2
    WARM_UP = 3
    """As `RUN`, without writing KV or updating counters."""
    RUN_AHEAD = 4
    """As `RUN`; the token ids are sent from device to device."""
    ROOM = 5
    """Asks for the bytes that a pool may take."""
    AGREED = 6
    """Tells whether all ranks succeeded, after each has reported for itself."""
    ALLOCATE_HOST = 7
    SAVE = 8
    """Begins a copy to host memory."""
    SAVED = 9
    """Rank 0 has finished the oldest such copy."""
    LOAD = 10
    """Begins a copy from host memory."""
    LOADED = 11
    DRAW = 12
    """Draws tokens from the logits of the last step."""
    GATHER = 13
    """Gathers these logits."""


class ChannelClosed(Exception):
    """The other end of a channel is gone."""


@dataclass(frozen=True, slots=True)
class RankJob:
    """What a rank needs to know to load its shard."""

    rank: int
    size: int
    store: str
    """A file in a private directory, through which the ranks find each other."""
    model: str
    dtype: str
    device: str
    attention: str
    max_model_len: int | None
    max_step_tokens: int
    threads: int
    """PyTorch threads of each rank."""
    load_format: str = "auto"
    kv_dtype: str = "auto"
    graphs: bool = False
    max_graph_rows: int = 0
    torch_compile: bool = False

    def as_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, frame: bytearray) -> "RankJob":
        return cls(**json.loads(frame))


class ModelInput(NamedTuple):
    """The arguments of `Model.run`."""

    plan: Plan
    token_ids: NDArray[np.int64]
    slots: NDArray[np.int64]
    logit_rows: NDArray[np.int64]


class Channel:
    """Frames over a connected stream socket."""

    def __init__(self, connected: socket.socket) -> None:
        self.socket = connected

    def send(self, frame: bytes) -> None:
        """Send a frame. Raises `ChannelClosed`."""
        try:
            self.socket.sendall(_LENGTH.pack(len(frame)) + frame)
        except OSError as error:
            raise ChannelClosed(str(error)) from error

    def receive(self, seconds: float | None = None) -> bytearray:
        """Return the next frame. Raises `ChannelClosed`, and `TimeoutError` after `seconds` without data."""
        try:
            self.socket.settimeout(seconds)
            (length,) = _LENGTH.unpack(self._exactly(_LENGTH.size))
            if length > MAX_FRAME:
                raise ChannelClosed(f"a frame of {length} bytes; at most {MAX_FRAME} are read")
            return self._exactly(length)
        except TimeoutError:
            raise
        except OSError as error:
            raise ChannelClosed(str(error)) from error
        finally:
            if self.socket.fileno() >= 0:
                self.socket.settimeout(None)

    def answer(self, **facts: int | str) -> None:
        self.send(json.dumps(facts).encode())

    def close(self) -> None:
        self.socket.close()

    def _exactly(self, count: int) -> bytearray:
        frame = bytearray(count)
        view = memoryview(frame)
        while view:
            read = self.socket.recv_into(view)
            if not read:
                raise ChannelClosed("the other end is gone")
            view = view[read:]
        return frame


def pack(kind: RankCommand, arrays: Sequence[Array] = ()) -> bytes:
    """Serialize a command with arrays of one or two dimensions: int32, int64 or float64."""
    parts = [_HEAD.pack(kind, len(arrays))]
    for array in arrays:
        rows, columns = array.shape if array.ndim == 2 else (array.size, 1)
        padding = bytes(-array.nbytes % _ALIGNMENT)
        parts += [_SHAPE.pack(_DTYPES.index(array.dtype), array.ndim, rows, columns), array.tobytes(), padding]
    return b"".join(parts)


def unpack(frame: bytearray) -> tuple[RankCommand, list[Array]]:
    """Parse a frame made by `pack`. The arrays are views of `frame`. Raises `ValueError` if it is malformed."""
    try:
        kind, count = _HEAD.unpack_from(frame)
        at, arrays = _HEAD.size, []
        for _ in range(count):
            code, dimensions, rows, columns = _SHAPE.unpack_from(frame, at)
            at += _SHAPE.size
            array = np.frombuffer(frame, _DTYPES[code], rows * columns, at)
            at += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
            arrays.append(array.reshape((rows, columns) if dimensions == 2 else rows))
        if at != len(frame):
            raise ValueError(f"{len(frame) - at} bytes too many")
        return RankCommand(kind), arrays
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"not a frame: {error}") from error


class PlanOrigins:
    """Numbers the built plans that are in use, so that ranks can tell whether two plans have the same origin.

    A graph can keep its tables if they were laid out for the same origin, so every rank must come to the same answer.
    """

    def __init__(self) -> None:
        self._numbers: dict[int, tuple[int, weakref.ref[Plan]]] = {}
        self._next = itertools.count()

    def number(self, plan: Plan) -> int:
        """Return the number of the plan's origin."""
        origin, numbers = plan.origin, self._numbers
        key = id(origin)
        if key not in numbers:
            forget = weakref.ref(origin, lambda _: numbers.pop(key, None))
            numbers[key] = next(self._next), forget
        return numbers[key][0]


def pack_step(step: ModelInput, kind: RankCommand = RankCommand.RUN, origin: int = 0) -> bytes:
    """Serialize a step without the arrays that only `explain` reads. `origin`: the plan's number in `PlanOrigins`."""
    plan = step.plan
    assert plan.window is None
    counts = np.array([plan.tile_rows, plan.age, origin], np.int64)
    columns = [getattr(plan, name) for name in COLUMNS]
    return pack(kind, [*step[1:], counts, np.array([plan.predicted]), *columns])


def unpack_step(arrays: Sequence[Array], origins: MutableMapping[int, Plan]) -> ModelInput:
    """Parse the arrays of `pack_step`. `origins`: plans by number, held weakly."""
    token_ids, slots, logit_rows, counts, predicted, *columns = arrays
    by_name: dict[str, Any] = dict(zip(COLUMNS, columns, strict=True))
    plan = Plan(
        **by_name,
        tile_rows=int(counts[0]),
        age=int(counts[1]),
        predicted=float(predicted[0]),
        nodes=_unexplained(),
        _origin=origins.get(int(counts[2])),
    )
    origins[int(counts[2])] = plan.origin
    return ModelInput(plan, token_ids, slots, logit_rows)


def _unexplained() -> NodeSummary:
    none = np.empty(0, np.int32)
    return NodeSummary(none, none, none, np.empty(0, np.int8), none)
