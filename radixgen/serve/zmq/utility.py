"""Utilities that front ends can call: those of vLLM's that apply here, and radixgen's own."""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec import Struct

from radixgen.core import InvalidRequest, check_integer
from radixgen.serve.zmq import wire, wire_params

if TYPE_CHECKING:
    from radixgen.cache import Node
    from radixgen.serve.zmq.service import Peer, Service

Arguments = TypeVar("Arguments", bound=Struct)
Utility = Callable[["Service", "Peer", wire.Call], Any]

PENDING: Final = object()
"""Result of a call that is answered later"""
MAX_NODES = 10_000
"""Maximum number of nodes in a snapshot of the tree"""
_PREVIEW = 8


class NoArguments(Struct, array_like=True):
    """No arguments; any that are given are ignored."""


class ForkArguments(Struct, array_like=True):
    """A live request, and the ids of its forks."""

    request_id: str
    names: list[str]


class ScoreArguments(Struct, array_like=True):
    """A prompt and its continuations, as token ids."""

    prompt_token_ids: list[int]
    continuations: list[list[int]]
    cache_salt: str | None = None


class PinArguments(Struct, array_like=True):
    """Arguments of `Engine.pin`."""

    prompt_token_ids: list[int]
    cache_salt: str | None = None
    priority: int = 0
    ttl: float | None = None
    replaces: int | None = None


class HintArguments(Struct, array_like=True):
    """Arguments of `Engine.apply_hints`."""

    prompt_token_ids: list[int]
    hints: list[wire.Hint]
    cache_salt: str | None = None
    hint_owner: str | None = None


class UnpinArguments(Struct, array_like=True):
    """The pin to release."""

    pin: int


class TreeArguments(Struct, array_like=True):
    """Maximum number of nodes to return, from the roots down."""

    nodes: int = 1_000


def _taking(kind: type[Arguments], run: Callable[["Service", "Peer", wire.Call, Arguments], Any]) -> Utility:
    """Utility that decodes its arguments as `kind`."""

    def utility(service: "Service", peer: "Peer", call: wire.Call) -> Any:
        try:
            arguments = wire.decode(call.args, kind)
        except wire.Malformed as error:
            raise InvalidRequest("args", call.method, str(error)) from None
        return run(service, peer, call, arguments)

    return utility


def _fork(service: "Service", peer: "Peer", call: wire.Call, arguments: ForkArguments) -> None:
    service.fork(peer, arguments.request_id, arguments.names)


def _score(service: "Service", peer: "Peer", call: wire.Call, arguments: ScoreArguments) -> Any:
    service.score(peer, call.call_id, arguments.prompt_token_ids, arguments.continuations, arguments.cache_salt)
    return PENDING


def _pin(service: "Service", peer: "Peer", call: wire.Call, arguments: PinArguments) -> int | None:
    """Pin a prefix for a front end; the pin is released when the front end is gone."""
    if arguments.replaces is not None and arguments.replaces not in peer.pins:
        raise InvalidRequest("replaces", arguments.replaces, "must be a pin of this front end")
    pin = service.engine.pin(
        arguments.prompt_token_ids,
        namespace=service.namespace(arguments.cache_salt, peer.salt_key),
        priority=arguments.priority,
        ttl=arguments.ttl,
        replaces=arguments.replaces,
    )
    peer.pins.discard(arguments.replaces or 0)
    if pin is not None:
        peer.pins.add(pin)
    if len(peer.pins) > 2 * service.engine.limits.max_pins:
        peer.pins &= service.engine.pins
    return pin


def _unpin(service: "Service", peer: "Peer", call: wire.Call, arguments: UnpinArguments) -> bool:
    if arguments.pin not in peer.pins:
        return False
    peer.pins.discard(arguments.pin)
    return service.engine.unpin(arguments.pin)


def _apply_hints(service: "Service", peer: "Peer", call: wire.Call, arguments: HintArguments) -> list[wire.HintAnswer]:
    results = service.engine.apply_hints(
        arguments.prompt_token_ids,
        wire_params.to_hints(arguments.hints),
        namespace=service.namespace(arguments.cache_salt, peer.salt_key),
        hint_owner=arguments.hint_owner,
    )
    return wire_params.from_results(results)


def _stats(service: "Service", peer: "Peer", call: wire.Call, _: NoArguments) -> dict[str, Any]:
    return {"engine": asdict(service.engine.stats()), "live": service.num_live, "own": asdict(peer.counters)}


def _tree(service: "Service", peer: "Peer", call: wire.Call, arguments: TreeArguments) -> list[list[Any]]:
    """Nodes of the tree from the roots down, each as `[parent, first tokens, known, computed, locks]`.

    `parent` is an index of the list, or -1 for a root.
    """
    check_integer("nodes", arguments.nodes, 1, MAX_NODES)
    todo: deque[tuple[Node, int]] = deque((root, -1) for root in service.engine.inspect(lambda core: core.tree).roots())
    rows: list[list[Any]] = []
    while todo and len(rows) < arguments.nodes:
        node, parent = todo.popleft()
        todo.extend((child, len(rows)) for child in node.children.values())
        rows.append([parent, node.token_ids[:_PREVIEW].tolist(), node.known, node.computed, node.lock_count])
    return rows


def _explain(service: "Service", peer: "Peer", call: wire.Call, _: NoArguments) -> str:
    return service.engine.explain_plan()


def _reset(service: "Service", peer: "Peer", call: wire.Call, _: NoArguments) -> bool:
    service.engine.reset_prefix_cache()
    return True


def _check(service: "Service", peer: "Peer", call: wire.Call, _: NoArguments) -> bool:
    service.check()
    return True


UTILITIES: Mapping[str, Utility] = {
    "fork": _taking(ForkArguments, _fork),
    "score": _taking(ScoreArguments, _score),
    "pin": _taking(PinArguments, _pin),
    "apply_hints": _taking(HintArguments, _apply_hints),
    "unpin": _taking(UnpinArguments, _unpin),
    "stats": _taking(NoArguments, _stats),
    "tree": _taking(TreeArguments, _tree),
    "explain": _taking(NoArguments, _explain),
    "check": _taking(NoArguments, _check),
    "reset_prefix_cache": _taking(NoArguments, _reset),
    "get_supported_tasks": _taking(NoArguments, lambda *_: ["generate"]),
    "is_sleeping": _taking(NoArguments, lambda *_: False),
}
"""Utilities that run in the engine's thread; the worker's I/O thread answers `is_healthy` and `counters`"""
