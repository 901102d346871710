"""Cursors of a beam search."""

from collections.abc import Sequence as Seq

from radixgen.core import SamplingState
from radixgen.sampling.beam_search import Beam
from radixgen.scheduler.scheduler import Scheduler
from radixgen.scheduler.sequence import Request, Sequence


def branch(scheduler: Scheduler, request: Request, beams: Seq[Beam]) -> None:
    """Move the request's sequences, one per beam of the previous generation, to `beams`.

    A sequence continues with the best of the beams that descend from it, and is forked for each other one. A sequence
    without descendants is dropped. No KV is copied. Sequences without a cursor return to the queue.
    """
    parents = list(request.sequences)
    followed = {beam.parent for beam in beams}
    for place, parent in enumerate(parents):
        if place not in followed:
            scheduler.drop(parent)
            request.remove_sequence(parent)
    children: list[Sequence] = []
    for beam in beams:
        parent = parents[beam.parent]
        children.append(_fork(scheduler, parent) if parent in children else parent)
    request.sequences = children
    for child, beam in zip(children, beams, strict=True):
        if child.choices is not None and child.cursor is None:
            scheduler.waiting.add(child)
        child.choices = None
        child.output.append(beam.token_ids[-1])
    scheduler.advance([(child, child.output[-1]) for child in children if child.cursor is not None])


def conclude(scheduler: Scheduler, request: Request, hypotheses: Seq[Seq[int]]) -> None:
    """Drop the beams of a search that has ended. With a host tier, only the paths of its hypotheses are saved."""
    for beam in request.sequences:
        scheduler.drop(beam)
    for tokens in hypotheses if scheduler.host is not None else ():
        scheduler.keep(request.path_with(tokens), request.namespace)


def _fork(scheduler: Scheduler, origin: Sequence) -> Sequence:
    """Add a beam at the position of `origin`."""
    request, state = origin.request, origin.sampling
    request.num_forks += 1
    own = origin.namespace
    if own != request.namespace:
        own = request.private_namespace(request.num_forks)
    copy = SamplingState(state.params, state.seed, request.num_forks, state.prompt, list(state.output), state.stop_ids)
    sequence = Sequence(request, request.num_forks, own, copy)
    request.add_sequence(sequence)
    scheduler.fork(origin, sequence)
    return sequence
