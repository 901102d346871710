"""`OutputProcessor`: turns tokens into text, finds stop strings, and makes the outputs of requests."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from radixgen.core import CompletionOutput, FinishReason, OutputKind, RequestFailed, RequestOutput
from radixgen.detokenize import Detokenizer
from radixgen.scheduler.sequence import Request, Sequence
from radixgen.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_PROMPT_TAIL = 16
"""Number of last prompt tokens that serve as context for decoding an answer"""


class ProcessedOutputs(NamedTuple):
    """Outputs for callers, and sequences to abort because of a stop string or a decoding error."""

    outputs: list[RequestOutput]
    to_abort: list[Sequence]


@dataclass(eq=False, slots=True)
class _SequenceState:
    """How much of a sequence was decoded and output."""

    detokenizer: Detokenizer | None = None
    num_decoded: int = 0
    """Number of decoded tokens"""
    num_tokens: int = 0
    """Number of tokens in outputs so far"""
    num_chars: int = 0
    """Number of characters in outputs so far"""
    num_summed: int = 0
    """Number of tokens summed in `logprob`"""
    logprob: float = 0.0

    def add_up(self, sequence: Sequence) -> float:
        """Return the log-probability of the whole output."""
        new = zip(sequence.logprobs[self.num_summed :], sequence.output[self.num_summed :], strict=True)
        self.logprob = sum((logprobs[token] for logprobs, token in new), self.logprob)
        self.num_summed = len(sequence.output)
        return self.logprob


@dataclass(eq=False, slots=True)
class _RequestState:
    kind: OutputKind
    has_prompt_logprobs: bool = False
    """Whether an output had the prompt's log-probabilities"""
    sequences: dict[Sequence, _SequenceState] = field(default_factory=dict)


class OutputProcessor:
    """Makes the outputs of requests, from submission to the last output.

    It changes nothing in its arguments except a sequence's finish reason and the tokens after a stop string, which it
    drops. The caller must drop the sequences in `to_abort` from the scheduler, or close their streams. An exception
    ends only the request that it belongs to, with `error`.
    """

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._requests: dict[Request, _RequestState] = {}

    def follow(self, request: Request, kind: OutputKind) -> str | None:
        """Follow a new request. A beam search gets only a final output.

        Return an error message if its text cannot be decoded; the caller must then abort the request.
        """
        if request.search is not None:
            kind = "final"
        state = self._requests[request] = _RequestState(kind)
        sequences = request.sequences if request.search is None else ()
        faults = [fault for sequence in sequences if (fault := self._begin(state, sequence))]
        return faults[0] if faults else None

    def follow_fork(self, origin: Request, fork: Request) -> None:
        """Follow a fork. The first output of each sequence has all that `origin` has generated."""
        before = self._requests[origin]
        self._requests[fork] = state = _RequestState(before.kind)
        for parent, sequence in zip(origin.sequences, fork.sequences, strict=True):
            own = before.sequences[parent]
            state.sequences[sequence] = _SequenceState(own.detokenizer and own.detokenizer.fork(), own.num_decoded)

    def process(self, touched: Iterable[Sequence]) -> ProcessedOutputs:
        """Make the outputs of requests whose sequences got tokens or ended. Stop following finished requests."""
        groups: dict[Request, dict[Sequence, None]] = {}
        outputs: list[RequestOutput] = []
        to_abort: list[Sequence] = []
        for sequence in touched:
            self._decode(sequence, to_abort)
            groups.setdefault(sequence.request, {})[sequence] = None
        for request, sequences in groups.items():
            try:
                output = self._output(request, sequences)
            except Exception as error:
                output = _failure(request, error, to_abort)
            if output is not None:
                outputs.append(output)
            if request.finished:
                del self._requests[request]
        return ProcessedOutputs(outputs, to_abort)

    def check(self, requests: Iterable[Request]) -> None:
        """Assert that exactly these requests are followed."""
        assert self._requests.keys() == set(requests)
        for request, state in self._requests.items():
            assert request.search is not None or state.sequences.keys() == set(request.sequences)

    # -- inside -------------------------------------------------------------------------------------------

    def _begin(self, state: _RequestState, sequence: Sequence) -> str | None:
        """Make a detokenizer. Returns an error message if that fails: a tokenizer may lack tokens of the model."""
        state.sequences[sequence] = own = _SequenceState()
        if self._vocabulary is None:
            return None
        params = sequence.request.params
        try:
            own.detokenizer = Detokenizer(
                self._vocabulary.tokenizer,
                sequence.request.prompt[-_PROMPT_TAIL:].tolist(),
                params.stop_strings,
                params.include_stop_str_in_output,
                params.skip_special_tokens,
                self._vocabulary,
            )
        except Exception as error:
            logger.exception("request %s: its prompt could not be decoded", sequence.request.id)
            return repr(error)
        return None

    def _decode(self, sequence: Sequence, to_abort: list[Sequence]) -> None:
        """Turn new tokens into text, and end the sequence at a stop string."""
        state = self._requests[sequence.request]
        if sequence not in state.sequences and (fault := self._begin(state, sequence)):
            _end(sequence, "error", fault, to_abort)
        own = state.sequences[sequence]
        if own.detokenizer is None:
            return
        try:
            stop = _push(sequence, own, own.detokenizer)
        except Exception as error:
            logger.exception("request %s: its text could not be decoded", sequence.request.id)
            own.detokenizer = None
            _end(sequence, "error", repr(error), to_abort)
        else:
            if stop is not None:
                _end(sequence, "stop", stop, to_abort)
            elif sequence.finish_reason is not None:
                own.detokenizer.finish()

    def _output(self, request: Request, touched: Iterable[Sequence]) -> RequestOutput | None:
        state = self._requests[request]
        if state.kind == "final" and not request.finished:
            return None
        delta = state.kind == "delta"
        sequences = touched if delta else request.sequences
        return RequestOutput(
            request_id=request.id,
            prompt_tokens=request.prompt_tokens,
            outputs=[_completion(sequence, state.sequences[sequence], delta) for sequence in sequences],
            finished=request.finished,
            num_cached_tokens=request.num_cached_tokens or 0,
            num_shared_tokens=request.num_shared_tokens,
            num_moved_tokens=request.num_moved_tokens,
            exact=request.exact,
            sharing_ended=request.sharing_ended,
            prompt_logprobs=_prompt_logprobs(request, state),
            queue_seconds=request.queue_seconds,
            cache_hints=request.hint_results,
        )


def _push(sequence: Sequence, state: _SequenceState, detokenizer: Detokenizer) -> str | None:
    """Decode new tokens. Returns the stop string that they complete, if any, and drops the tokens after it.

    A token that ended the sequence is left out of the text, like a stop string.
    """
    params, output = sequence.request.params, sequence.output
    count = len(output)
    if sequence.ended_by_token and not params.include_stop_str_in_output:
        count -= 1
    while state.num_decoded < count:
        token = output[state.num_decoded]
        state.num_decoded += 1
        stop = detokenizer.push(token, state.num_decoded > params.min_tokens)
        if stop is not None:
            del output[state.num_decoded :], sequence.logprobs[state.num_decoded :]
            return stop
    return None


def _end(sequence: Sequence, reason: FinishReason, stop_reason: str, to_abort: list[Sequence]) -> None:
    """End a sequence, or correct its finish reason."""
    if sequence.finish_reason is None:
        sequence.finish(reason, stop_reason)
        to_abort.append(sequence)
    else:
        sequence.finish_reason, sequence.stop_reason = reason, stop_reason


def _completion(sequence: Sequence, state: _SequenceState, delta: bool) -> CompletionOutput:
    tokens, chars = (state.num_tokens, state.num_chars) if delta else (0, 0)
    state.num_tokens = len(sequence.output)
    text = ""
    if state.detokenizer is not None:
        state.num_chars = state.detokenizer.safe_length
        text = state.detokenizer.text[chars : state.num_chars]
    output = CompletionOutput(
        index=sequence.index,
        text=text,
        token_ids=sequence.output[tokens:],
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
    )
    if sequence.request.params.logprobs is not None:
        output.logprobs = sequence.logprobs[tokens:]
        output.cumulative_logprob = state.add_up(sequence)
    if sequence.request.search is not None:
        hypothesis = sequence.request.search.hypotheses[sequence.index]
        output.cumulative_logprob, output.score = hypothesis.cumulative_logprob, hypothesis.score
    return output


def _prompt_logprobs(request: Request, state: _RequestState) -> list[dict[int, float] | None] | None:
    """Return the prompt's log-probabilities, or None until complete. Only one delta has them."""
    if request.params.prompt_logprobs is None or request.scoring:
        return None
    if state.kind == "delta" and state.has_prompt_logprobs:
        return None
    state.has_prompt_logprobs = True
    return [None, *request.prompt_logprobs]


def _failure(request: Request, error: Exception, to_abort: list[Sequence]) -> RequestOutput:
    """Make the last output of a request whose output failed."""
    logger.error("request %s: its output could not be made", request.id, exc_info=error)
    for sequence in request.sequences:
        _end(sequence, "error", repr(error), to_abort)
    outputs = [CompletionOutput(s.index, "", [], s.finish_reason, s.stop_reason) for s in request.sequences]
    return RequestOutput(request.id, request.prompt_tokens, outputs, finished=True, exact=request.exact)


def scores_of(output: RequestOutput) -> list[float]:
    """Return the natural-log probability of each token of the continuation, from the only output of a request made by
    `Engine.submit_score`. Raises `RequestFailed`.
    """
    if output.prompt_logprobs is None:
        raise RequestFailed(f"request {output.request_id} was not scored: {output.outputs[0].stop_reason}")
    return [next(iter(logprobs.values())) for logprobs in output.prompt_logprobs if logprobs]
