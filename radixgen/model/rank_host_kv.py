"""KV in host memory of all ranks of a sharded model: each copies that of its own heads."""

from collections import deque
from collections.abc import Callable

from radixgen.cache import Copy
from radixgen.model.host_kv import HostKV, Slots
from radixgen.model.lockstep import RankCommand


class SharedHostKV:
    """The `KVCopies` of rank 0. `send` sends a command and its arrays to the other ranks."""

    def __init__(self, own: HostKV, send: Callable[[RankCommand, list[Slots]], None]) -> None:
        self.num_slots = own.num_slots
        self._own = own
        self._send = send

    def save(self, slots: Slots, host_slots: Slots) -> Copy:
        """As `KVCopies.save`."""
        self._send(RankCommand.SAVE, [slots, host_slots])
        return SharedCopy(self._own.save(slots, host_slots), lambda: self._send(RankCommand.SAVED, []))

    def load(self, host_slots: Slots, slots: Slots) -> Copy:
        """As `KVCopies.load`."""
        self._send(RankCommand.LOAD, [host_slots, slots])
        return SharedCopy(self._own.load(host_slots, slots), lambda: self._send(RankCommand.LOADED, []))

    def release(self) -> None:
        """As `KVCopies.release`. The other ranks end with the model."""
        self._own.release()


class SharedCopy:
    """A copy of all ranks. When rank 0 has finished its part, the others have their next steps wait for theirs."""

    def __init__(self, own: Copy, tell: Callable[[], None]) -> None:
        self._own = own
        self._tell: Callable[[], None] | None = tell

    @property
    def seconds(self) -> float:
        return self._own.seconds

    def done(self) -> bool:
        if not self._own.done():
            return False
        self._finish()
        return True

    def wait(self) -> None:
        self._own.wait()
        self._finish()

    def _finish(self) -> None:
        if self._tell is not None:
            self._tell()
            self._tell = None  # only now: if an interrupt comes between, the others must not miss the end of the copy


class FollowerHostKV:
    """The KV in host memory of another rank, which follows the commands of rank 0."""

    def __init__(self, own: HostKV) -> None:
        self._own = own
        self._copies: dict[RankCommand, deque[Copy]] = {RankCommand.SAVED: deque(), RankCommand.LOADED: deque()}

    def follow(self, kind: RankCommand, arrays: list[Slots]) -> None:
        """Begin a copy, or make later steps wait for the oldest one of its direction."""
        if kind is RankCommand.SAVE:
            self._copies[RankCommand.SAVED].append(self._own.save(*arrays))
        elif kind is RankCommand.LOAD:
            self._copies[RankCommand.LOADED].append(self._own.load(*arrays))
        else:
            self._own.join(self._copies[kind].popleft())
