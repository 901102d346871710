"""Beam search by transformers alone, one unpadded prompt at a time, and a model of the oracle's logits for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from oracle import expected_logits
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from radixgen import BeamSearchParams

TIE = 1e-4
_PAD = 1


@dataclass(frozen=True, slots=True)
class Searched:
    """What `generate(num_beams=width)` finds, best first.

    margin: the least difference of two scores at a cut: of those that go on or are kept and those that do not, or
        of two results.
    """

    token_ids: list[list[int]]
    scores: list[float]
    margin: float


class OracleLM(PreTrainedModel, GenerationMixin):
    """The oracle's logits in transformers' clothes."""

    config_class = PretrainedConfig

    def __init__(self, vocab: int) -> None:
        super().__init__(PretrainedConfig(vocab_size=vocab, num_hidden_layers=1))
        self.vocab = vocab
        self.nothing = nn.Parameter(torch.zeros(1))
        self.generation_config = GenerationConfig(use_cache=False)
        self.eval()

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutputWithPast:
        rows = [expected_logits(row, self.vocab) for row in input_ids.tolist()]
        return CausalLMOutputWithPast(logits=torch.from_numpy(np.stack(rows))[:, None])


def reference_search(
    model: PreTrainedModel, prompt: Sequence[int], params: BeamSearchParams, ends: Sequence[int] = ()
) -> Searched:
    """The hypotheses of a beam search in which `ends` end one."""
    width, own = params.beam_width, model.generation_config
    options: dict[str, Any] = {}
    if width > 1:
        options["early_stopping"] = params.early_stopping
        options["length_penalty"] = params.length_penalty
    if params.min_tokens:
        options["min_new_tokens"] = params.min_tokens
    model.generation_config = GenerationConfig(
        max_new_tokens=params.max_tokens,
        num_beams=width,
        num_return_sequences=width,
        do_sample=False,
        pad_token_id=_PAD,
        eos_token_id=list(ends) or None,
        use_cache=own.use_cache,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        **options,
    )
    ids = torch.tensor([list(prompt)])
    try:
        with _margins(width) as margins:
            found = model.generate(ids, attention_mask=torch.ones_like(ids))
    finally:
        model.generation_config = own
    tokens = [_cut(row[len(prompt) :].tolist(), params.min_tokens, ends) for row in found.sequences]
    if width == 1:
        steps = [float(row[0].log_softmax(-1)[token]) for row, token in zip(found.logits, tokens[0], strict=True)]
        return Searched(tokens, [sum(steps) / len(steps) ** params.length_penalty], _least_margin(found.scores))
    scores = found.sequences_scores.tolist()
    return Searched(tokens, scores, min([*margins, *-np.diff(scores)]))


def _cut(token_ids: list[int], min_tokens: int, ends: Sequence[int]) -> list[int]:
    """Without the padding behind the first end."""
    for place, token in enumerate(token_ids):
        if token in ends and place >= min_tokens:
            return token_ids[: place + 1]
    return token_ids


def _least_margin(scores: Sequence[Tensor]) -> float:
    return min(float(-row[0].topk(2).values.diff()) for row in scores)


@contextmanager
def _margins(width: int) -> Iterator[list[float]]:
    """By how much, in each choice of the best, the last chosen leads the first left out, and the last that may end
    leads the first that may not.
    """
    plain, found = torch.topk, []

    def topk(scores: Tensor, k: int, *args: Any, **options: Any) -> Any:
        if scores.ndim == 2 and scores.shape[0] == 1 and k % width == 0:
            ordered = scores[0].sort(descending=True).values
            cuts = [last for last in (k, width) if last < ordered.numel() and ordered[last] > -1e8]
            found.extend(float(ordered[last - 1] - ordered[last]) for last in cuts)
        return plain(scores, k, *args, **options)

    with patch("torch.topk", topk):
        yield found
