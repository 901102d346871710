"""Changes of sequences between two steps: a new token, a fork, the end of a beam search, an error."""

import logging
from dataclasses import replace

from radixgen.core import FinishReason, SamplingState
from radixgen.sampling.beam_search import BeamSearch
from radixgen.sampling.sampler import fork_seed
from radixgen.scheduler.sequence import Request, Sequence

logger = logging.getLogger(__name__)


def append_token(sequence: Sequence, token: int, logprobs: dict[int, float] | None) -> FinishReason | None:
    """Append a drawn token to its sequence. Returns the finish reason if the sequence ends. Raises the errors of its
    grammar; then the token is not appended.
    """
    request, state, output = sequence.request, sequence.sampling, sequence.output
    grammar, params = state.grammar, request.params
    is_end = token in state.stop_ids and (
        len(output) >= params.min_tokens or (grammar is not None and not grammar.allows(token))
    )
    if grammar is not None and not is_end:
        if grammar.complete:  # its mask allowed nothing more, and there was no end token to draw
            return "stop"
        grammar.accept(token)
    output.append(token)
    if logprobs is not None:
        sequence.logprobs.append(logprobs)
    sequence.ended_by_token = is_end
    if is_end or (grammar is not None and grammar.complete):
        return "stop"
    return "length" if len(output) >= request.max_output else None


def fork_sequence(origin: Sequence, fork: Request, number: int) -> Sequence:
    """Copy `origin` for `fork`, the request's fork of this number. The copy has no cursor."""
    state = origin.sampling
    own = SamplingState(
        state.params,
        fork_seed(state.seed, number),
        state.index,
        state.prompt,
        list(state.output),
        state.stop_ids,
        state.grammar.fork() if state.grammar else None,
    )
    shares = origin.namespace == fork.namespace
    return replace(
        origin,
        request=fork,
        namespace=fork.namespace if shares else fork.private_namespace(origin.index),
        sampling=own,
        cursor=None,
        logprobs=list(origin.logprobs),
        scheduled_in=-1,
        freed_block=-1,
        pressed=False,
        followed=None,
        fetch=None,
        runs=None,
    )


def conclude_search(request: Request, search: BeamSearch, stop_reason: str | None) -> None:
    """Replace the beams of a finished search by its hypotheses. The beams must have no cursors."""
    state = request.sequences[0].sampling
    for beam in list(request.sequences):
        request.remove_sequence(beam)
    for index, hypothesis in enumerate(search.hypotheses):
        tokens, stops = hypothesis.token_ids, hypothesis.finish_reason == "stop"
        own = SamplingState(state.params, state.seed, index, state.prompt, tokens, state.stop_ids)
        sequence = Sequence(request, index, request.namespace, own)
        sequence.finish_reason, sequence.ended_by_token = hypothesis.finish_reason, stops
        sequence.stop_reason = tokens[-1] if stops and tokens[-1] in state.params.stop_token_ids else stop_reason
        request.add_sequence(sequence)


def request_error(error: Exception, request: Request, message: str) -> str:
    """Log an error that ends only its request, and return its text. Raises an `AssertionError`, which is a bug of the
    engine.
    """
    if isinstance(error, AssertionError):
        raise error
    logger.error(message, request.id, exc_info=error)
    return repr(error)
