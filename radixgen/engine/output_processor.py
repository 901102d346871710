"""From tokens to what callers get: text, stop strings, and outputs as each request wants them."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from radixgen.core import CompletionOutput, FinishReason, OutputKind, RequestFailed, RequestOutput
from radixgen.scheduler.sequence import Request, Sequence
from radixgen.text.detokenize import Detokenizer
from radixgen.text.vocabulary import Vocabulary

logger = logging.getLogger(__name__)

_PROMPT_TAIL = 16
"""Prompt tokens after which the text of an answer is decoded"""


class ProcessedOutputs(NamedTuple):
    """Outputs for callers, and the sequences to be aborted: they ended at a stop string, or their text failed."""

    outputs: list[RequestOutput]
    to_abort: list[Sequence]


@dataclass(eq=False, slots=True)
class _SequenceState:
    """How much of a sequence was decoded, and how much was output."""

    detokenizer: Detokenizer | None = None
    num_decoded: int = 0
    """Tokens that became text"""
    num_tokens: int = 0
    """Tokens in outputs so far"""
    num_chars: int = 0
    """Characters in outputs so far"""
    num_summed: int = 0
    """Tokens whose log-probabilities are in `logprob`"""
    logprob: float = 0.0

    def add_up(self, sequence: Sequence) -> float:
        """The log-probability of the whole output."""
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
    """Follows requests from their submission to their last output. Of all that it is given it changes only how a
    sequence ended; whoever runs the sequences takes those to abort out of the batch.

    An exception here ends the request that it belongs to, with `error`, and no other.
    """

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        self._vocabulary = vocabulary
        self._requests: dict[Request, _RequestState] = {}

    def follow(self, request: Request, kind: OutputKind) -> str | None:
        """Follow a new request; of a beam search there is an output only in the end. Returns why its text can't be
        decoded, where it is so: then it is to be aborted.
        """
        if request.search is not None:
            kind = "final"
        state = self._requests[request] = _RequestState(kind)
        sequences = request.sequences if request.search is None else ()
        faults = [fault for sequence in sequences if (fault := self._begin(state, sequence))]
        return faults[0] if faults else None

    def follow_fork(self, origin: Request, fork: Request) -> None:
        """Follow a fork. The first output of each of its sequences has all that `origin` has generated."""
        before = self._requests[origin]
        self._requests[fork] = state = _RequestState(before.kind)
        for parent, sequence in zip(origin.sequences, fork.sequences, strict=True):
            own = before.sequences[parent]
            state.sequences[sequence] = _SequenceState(own.detokenizer and own.detokenizer.fork(), own.num_decoded)

    def process(self, touched: Iterable[Sequence]) -> ProcessedOutputs:
        """Outputs of the requests whose sequences gained tokens or ended. Finished requests are forgotten."""
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
        """Assert that these are the requests that are followed."""
        assert self._requests.keys() == set(requests)
        for request, state in self._requests.items():
            assert request.search is not None or state.sequences.keys() == set(request.sequences)

    # -- inside -------------------------------------------------------------------------------------------

    def _begin(self, state: _RequestState, sequence: Sequence) -> str | None:
        """Make a detokenizer. Returns why there is none: a tokenizer need not know each token of the model."""
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
        """Turn new tokens into text; a stop string ends the sequence."""
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
            sharing_ended=request.sharing_ended,
            prompt_logprobs=_prompt_logprobs(request, state),
            queue_seconds=request.queue_seconds,
        )


def _push(sequence: Sequence, state: _SequenceState, detokenizer: Detokenizer) -> str | None:
    """The stop string that the new tokens complete; tokens after it are dropped. The text of a token that ended the
    sequence is left out, as that of a stop string.
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
    """End a sequence, or correct how it ended."""
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
    """None until complete; of deltas only one has them."""
    if request.params.prompt_logprobs is None or request.reading:
        return None
    if state.kind == "delta" and state.has_prompt_logprobs:
        return None
    state.has_prompt_logprobs = True
    return [None, *request.prompt_logprobs]


def _failure(request: Request, error: Exception, to_abort: list[Sequence]) -> RequestOutput:
    """The last output of a request of which no other can be made."""
    logger.error("request %s: its output could not be made", request.id, exc_info=error)
    for sequence in request.sequences:
        _end(sequence, "error", repr(error), to_abort)
    outputs = [CompletionOutput(s.index, "", [], s.finish_reason, s.stop_reason) for s in request.sequences]
    return RequestOutput(request.id, request.prompt_tokens, outputs, finished=True)


def scores_of(output: RequestOutput) -> list[float]:
    """The result of `Engine.submit_score`, from the request's only output: a natural-log probability for each token of
    the continuation. Raises `RequestFailed`.
    """
    if output.prompt_logprobs is None:
        raise RequestFailed(f"request {output.request_id} was not scored: {output.outputs[0].stop_reason}")
    return [next(iter(logprobs.values())) for logprobs in output.prompt_logprobs if logprobs]
