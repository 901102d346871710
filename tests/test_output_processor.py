"""`OutputProcessor` without a core: what it makes of tokens, and which sequences it wants aborted."""

from typing import Any

import numpy as np
import texts

from radixgen import SamplingParams
from radixgen.core import OutputKind, SamplingState
from radixgen.engine.output_processor import OutputProcessor
from radixgen.scheduler.sequence import Request, Sequence
from radixgen.text.vocabulary import Vocabulary

TOKENIZER = texts.tokenizer()


def tokens(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def follow(processor: OutputProcessor, kind: OutputKind = "delta", **options: Any) -> Request:
    params, prompt = SamplingParams(**options), np.array(tokens("A b"), np.int32)
    request = Request("name", 0, prompt, params, 100)
    for index in range(params.n):
        request.add_sequence(Sequence(request, index, "", SamplingState(params, 0, index, prompt, [], frozenset())))
    assert processor.follow(request, kind) is None
    return request


def test_a_stop_string_ends_a_sequence_and_has_it_aborted() -> None:
    processor = OutputProcessor(Vocabulary(TOKENIZER))
    request = follow(processor, stop="c", n=2, logprobs=0)
    first, second = request.sequences
    for sequence, text in ((first, "b c b b"), (second, "b b")):
        sequence.output += tokens(text)
        sequence.logprobs += [{token: -1.0} for token in sequence.output]
    (output,), to_abort = processor.process(request.sequences)
    assert to_abort == [first] and not output.finished and not request.finished
    stopped, going = output.outputs
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "c") and "c" not in stopped.text
    assert len(stopped.token_ids) == len(stopped.logprobs or []) < len(tokens("b c b b"))
    assert going.finish_reason is None and going.token_ids == tokens("b b")
    second.finish("length")
    (output,), to_abort = processor.process([second])
    assert output.finished and not to_abort and output.outputs[0].token_ids == []
    processor.check([])


def test_a_stop_string_corrects_how_a_sequence_ended() -> None:
    processor = OutputProcessor(Vocabulary(TOKENIZER))
    request = follow(processor, "final", stop="c")
    (sequence,) = request.sequences
    sequence.output += tokens("b c")
    sequence.finish("length")
    (output,), to_abort = processor.process([sequence])
    assert not to_abort and output.outputs[0].finish_reason == "stop" and output.finished


def test_text_that_fails_has_its_sequence_aborted() -> None:
    processor = OutputProcessor(Vocabulary(TOKENIZER))
    request = follow(processor)
    (sequence,) = request.sequences
    sequence.output.append("no token")  # type: ignore[arg-type]
    (output,), to_abort = processor.process([sequence])
    assert to_abort == [sequence] and output.finished and output.outputs[0].finish_reason == "error"
    processor.check([])


def test_prompt_logprobs_are_in_one_delta() -> None:
    processor = OutputProcessor(None)
    request = follow(processor, prompt_logprobs=0, n=2)
    request.prompt_logprobs = [{1: -1.0}]
    (first,), _ = processor.process(request.sequences[:1])
    (second,), _ = processor.process(request.sequences[1:])
    assert first.prompt_logprobs == [None, {1: -1.0}] and second.prompt_logprobs is None
