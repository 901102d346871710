"""What front ends may call besides sending requests: vLLM's utilities that have a meaning here, and radixgen's own."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import Struct

from radixgen.core import InvalidRequest, check_integer
from radixgen.serve import wire

if TYPE_CHECKING:
    from radixgen.cache import Node
    from radixgen.serve.service import Peer, Service

Arguments = TypeVar("Arguments", bound=Struct)
Utility = Callable[["Service", "Peer", wire.Call], Any]

PENDING: Final = object()
"""The result of a call that is answered later."""
MAX_NODES = 10_000
"""Nodes of one snapshot of the tree."""
_PREVIEW = 8


class Nothing(Struct, array_like=True):
    """No arguments; what is given is not looked at."""


class Fork(Struct, array_like=True):
    """A live request, and the names that its forks are to have."""

    request_id: str
    names: list[str]


class Score(Struct, array_like=True):
    """A prompt and what may follow it, as token ids."""

    prompt_token_ids: list[int]
    continuations: list[list[int]]
    cache_salt: str | None = None


class Pin(Struct, array_like=True):
    """What `Engine.pin` takes. Higher priorities are kept longer."""

    prompt_token_ids: list[int]
    cache_salt: str | None = None
    priority: int = 0
    ttl: float | None = None
    replaces: int | None = None


class Unpin(Struct, array_like=True):
    """A pin."""

    pin: int


class Tree(Struct, array_like=True):
    """How many nodes at the most, from the roots down."""

    nodes: int = 1_000


def _taking(kind: type[Arguments], run: Callable[["Service", "Peer", wire.Call, Arguments], Any]) -> Utility:
    """A utility whose arguments are of this type."""

    def utility(service: "Service", peer: "Peer", call: wire.Call) -> Any:
        try:
            arguments = wire.decode(call.args, kind)
        except wire.Malformed as error:
            raise InvalidRequest("args", call.method, str(error)) from None
        return run(service, peer, call, arguments)

    return utility


def _fork(service: "Service", peer: "Peer", call: wire.Call, asked: Fork) -> None:
    service.fork(peer, asked.request_id, asked.names)


def _score(service: "Service", peer: "Peer", call: wire.Call, asked: Score) -> Any:
    service.score(peer, call.call_id, asked.prompt_token_ids, asked.continuations, asked.cache_salt)
    return PENDING


def _pin(service: "Service", peer: "Peer", call: wire.Call, asked: Pin) -> int | None:
    """A peer's pins are its own: they go with it."""
    if asked.replaces is not None and asked.replaces not in peer.pins:
        raise InvalidRequest("replaces", asked.replaces, "is no pin of this front end")
    pin = service.engine.pin(
        asked.prompt_token_ids,
        namespace=service.namespace(asked.cache_salt, peer.salt_key),
        priority=asked.priority,
        ttl=asked.ttl,
        replaces=asked.replaces,
    )
    peer.pins.discard(asked.replaces or 0)
    if pin is not None:
        peer.pins.add(pin)
    if len(peer.pins) > 2 * service.engine.limits.max_pins:
        peer.pins &= service.engine.pins
    return pin


def _unpin(service: "Service", peer: "Peer", call: wire.Call, asked: Unpin) -> bool:
    if asked.pin not in peer.pins:
        return False
    peer.pins.discard(asked.pin)
    return service.engine.unpin(asked.pin)


def _stats(service: "Service", peer: "Peer", call: wire.Call, _: Nothing) -> dict[str, Any]:
    return {"engine": asdict(service.engine.stats()), "live": service.num_live, "own": asdict(peer.counters)}


def _tree(service: "Service", peer: "Peer", call: wire.Call, asked: Tree) -> list[list[Any]]:
    """The tree from its roots down, each node as `[parent, first tokens, known, computed, locks]`, where `parent` is a
    place in the list, or -1.
    """
    check_integer("nodes", asked.nodes, 1, MAX_NODES)
    todo: deque[tuple[Node, int]] = deque((root, -1) for root in service.engine.inspect(lambda core: core.tree).roots())
    found: list[list[Any]] = []
    while todo and len(found) < asked.nodes:
        node, parent = todo.popleft()
        todo.extend((child, len(found)) for child in node.children.values())
        found.append([parent, node.tokens[:_PREVIEW].tolist(), node.known, node.computed, node.lock_count])
    return found


def _explain(service: "Service", peer: "Peer", call: wire.Call, _: Nothing) -> str:
    return service.engine.explain()


def _reset(service: "Service", peer: "Peer", call: wire.Call, _: Nothing) -> bool:
    service.engine.reset_prefix_cache()
    return True


def _check(service: "Service", peer: "Peer", call: wire.Call, _: Nothing) -> bool:
    service.check()
    return True


UTILITIES: Mapping[str, Utility] = {
    "fork": _taking(Fork, _fork),
    "score": _taking(Score, _score),
    "pin": _taking(Pin, _pin),
    "unpin": _taking(Unpin, _unpin),
    "stats": _taking(Nothing, _stats),
    "tree": _taking(Tree, _tree),
    "explain": _taking(Nothing, _explain),
    "check": _taking(Nothing, _check),
    "reset_prefix_cache": _taking(Nothing, _reset),
    "get_supported_tasks": _taking(Nothing, lambda *_: ["generate"]),
    "is_sleeping": _taking(Nothing, lambda *_: False),
}
"""Those that the engine's thread answers; `is_healthy` and `counters` are the worker's."""
