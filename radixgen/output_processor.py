"""From the core's tokens to what callers get: text, stop strings, and outputs as each request asked for them."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass

from radixgen.core import CompletionOutput, FinishReason, OutputKind, RequestOutput
from radixgen.detokenize import Detokenizer
from radixgen.engine_core import EngineCore
from radixgen.scheduler.sequence import Request, Sequence
from radixgen.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Told:
    """How far one sequence has been read, and how far its caller was told of it."""

    detokenizer: Detokenizer | None
    read: int = 0
    tokens: int = 0
    characters: int = 0
    summed: int = 0
    """Tokens whose log-probabilities are in `logprob`"""
    logprob: float = 0.0

    def add_up(self, sequence: Sequence) -> float:
        """The log-probability of the whole output."""
        own = zip(sequence.logprobs[self.summed :], sequence.output[self.summed :], strict=True)
        self.logprob = sum((found[token] for found, token in own), self.logprob)
        self.summed = len(sequence.output)
        return self.logprob


class OutputProcessor:
    """Follows every live request from its submission to its last output. An exception here ends the request
    that it belongs to, with `error`, and no other.
    """

    def __init__(self, core: EngineCore, vocabulary: Vocabulary | None) -> None:
        self._core = core
        self._vocabulary = vocabulary
        self._kinds: dict[Request, OutputKind] = {}
        self._told: dict[Sequence, _Told] = {}
        self._prompt_told: set[Request] = set()

    def follow(self, request: Request, kind: OutputKind) -> None:
        """Of a beam search only the hypotheses are told, when it is over."""
        if request.search is not None:
            self._kinds[request] = "final"
            return
        self._kinds[request] = kind
        faults = [fault for sequence in request.sequences if (fault := self._begin(sequence))]
        if faults:
            self._core.abort(request, "error", faults[0])

    def follow_fork(self, origin: Request, fork: Request) -> None:
        """What `origin` has generated is told of `fork` too, in the first output of each of its sequences."""
        self._kinds[fork] = self._kinds[origin]
        for before, sequence in zip(origin.sequences, fork.sequences, strict=True):
            told = self._told[before]
            self._told[sequence] = _Told(told.detokenizer and told.detokenizer.fork(), told.read)

    def process(self, touched: Iterable[Sequence]) -> list[RequestOutput]:
        """Outputs of the requests whose sequences gained tokens or ended. Finished requests are forgotten."""
        groups: dict[Request, dict[Sequence, None]] = {}
        for sequence in touched:
            if sequence not in self._told and (fault := self._begin(sequence)):
                self._end(sequence, "error", fault)
            self._read(sequence)
            groups.setdefault(sequence.request, {})[sequence] = None
        outputs = []
        for request, sequences in groups.items():
            try:
                output = self._output(request, sequences)
            except Exception as error:
                output = self._failure(request, error)
            if output is not None:
                outputs.append(output)
            if request.finished:
                self._forget(request)
        return outputs

    def check(self) -> None:
        """Assert that every request that is not reported to its end is followed, and no other."""
        assert self._kinds.keys() == set(self._core.requests.values())
        assert self._told.keys() == {s for r in self._kinds if r.search is None for s in r.sequences}

    # -- inside -------------------------------------------------------------------------------------------

    def _begin(self, sequence: Sequence) -> str | None:
        """From here on its tokens become text. Returns why they can't: a tokenizer need not know each token of the
        model.
        """
        told, params = _Told(None), sequence.request.params
        self._told[sequence] = told
        if self._vocabulary is None:
            return None
        prompt = sequence.request.prompt[-16:].tolist()
        try:
            told.detokenizer = Detokenizer(
                self._vocabulary.tokenizer,
                prompt,
                params.stop_strings,
                params.include_stop_str_in_output,
                params.skip_special_tokens,
                self._vocabulary,
            )
        except Exception as error:
            logger.exception("request %s: its prompt could not be decoded", sequence.request.id)
            return repr(error)
        return None

    def _read(self, sequence: Sequence) -> None:
        """Turn new tokens into text; a stop string ends the sequence."""
        told = self._told[sequence]
        if told.detokenizer is None:
            return
        try:
            stop = self._push(sequence, told.detokenizer, told)
        except Exception as error:
            logger.exception("request %s: its text could not be decoded", sequence.request.id)
            told.detokenizer = None
            self._end(sequence, "error", repr(error))
        else:
            if stop is not None:
                self._end(sequence, "stop", stop)
            elif sequence.finish_reason is not None:
                told.detokenizer.finish()

    def _push(self, sequence: Sequence, detokenizer: Detokenizer, told: _Told) -> str | None:
        """The stop string that the new tokens complete. The text of a token that ended the sequence is left out,
        as that of a stop string.
        """
        params = sequence.request.params
        count = len(sequence.output)
        if sequence.ended_by_token and not params.include_stop_str_in_output:
            count -= 1
        while told.read < count:
            token = sequence.output[told.read]
            told.read += 1
            stop = detokenizer.push(token, told.read > params.min_tokens)
            if stop is not None:
                return stop
        return None

    def _end(self, sequence: Sequence, reason: FinishReason, stop_reason: str) -> None:
        if sequence.finish_reason is None:
            self._core.end(sequence, reason, stop_reason)
        else:
            sequence.finish_reason, sequence.stop_reason = reason, stop_reason

    def _output(self, request: Request, touched: Iterable[Sequence]) -> RequestOutput | None:
        kind = self._kinds[request]
        if kind == "final" and not request.finished:
            return None
        told = touched if kind == "delta" else request.sequences
        return RequestOutput(
            request_id=request.id,
            prompt_tokens=request.prompt_tokens,
            outputs=[self._completion(sequence, kind == "delta") for sequence in told],
            finished=request.finished,
            num_cached_tokens=request.num_cached_tokens or 0,
            num_shared_tokens=request.num_shared_tokens,
            sharing_ended=request.sharing_ended,
            prompt_logprobs=self._prompt_logprobs(request, kind),
            queue_seconds=request.queue_seconds,
        )

    def _completion(self, sequence: Sequence, delta: bool) -> CompletionOutput:
        told = self._told[sequence]
        tokens, characters = (told.tokens, told.characters) if delta else (0, 0)
        told.tokens = len(sequence.output)
        text = ""
        if told.detokenizer is not None:
            told.characters = told.detokenizer.safe_length
            text = told.detokenizer.text[characters : told.characters]
        output = CompletionOutput(
            index=sequence.index,
            text=text,
            token_ids=sequence.output[tokens:],
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
        )
        if sequence.request.params.logprobs is not None:
            output.logprobs = sequence.logprobs[tokens:]
            output.cumulative_logprob = told.add_up(sequence)
        if sequence.request.search is not None:
            hypothesis = sequence.request.search.hypotheses[sequence.index]
            output.cumulative_logprob, output.score = hypothesis.cumulative_logprob, hypothesis.score
        return output

    def _prompt_logprobs(self, request: Request, kind: OutputKind) -> list[dict[int, float] | None] | None:
        """None until complete; once told in deltas, not again."""
        if request.params.prompt_logprobs is None or request.reading:
            return None
        if kind == "delta" and request in self._prompt_told:
            return None
        self._prompt_told.add(request)
        return [None, *request.prompt_logprobs]

    def _failure(self, request: Request, error: Exception) -> RequestOutput:
        """The last output of a request of which no other can be made."""
        logger.error("request %s: its output could not be made", request.id, exc_info=error)
        for sequence in request.sequences:
            self._end(sequence, "error", repr(error))
        outputs = [CompletionOutput(s.index, "", [], s.finish_reason, s.stop_reason) for s in request.sequences]
        return RequestOutput(request.id, request.prompt_tokens, outputs, finished=True)

    def _forget(self, request: Request) -> None:
        self._core.forget(request)
        del self._kinds[request]
        self._prompt_told.discard(request)
        for sequence in request.sequences:
            del self._told[sequence]
