"""A model that knows the answers: no weights, only a script of the lines that may come next.

It is served like any other (its tokens are bytes), so that what a search costs and finds can be seen without a model
that is good at the task.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from radixgen.core import Plan

Script = Callable[[str, str], Mapping[str, float]]
"""From the lines so far and the line that is being written to whole lines, each with a weight."""
END = "\n"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    plain.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=plain)


CHARACTERS = [tokenizer().decode([token]) for token in range(256)]
"""Text of each token; beyond ASCII no more than a part of a character"""
TOKENS = {character: token for token, character in enumerate(CHARACTERS)}


def next_logits(script: Script, text: str) -> NDArray[np.float32]:
    """Logits `[256]` after `text`: each character as likely as the lines that go on with it; none known, the line
    ends.
    """
    before, _, line = text.rpartition(END)
    lines = {whole + END: weight for whole, weight in script(before + END, line).items() if whole.startswith(line)}
    weights: dict[str, float] = {}
    for whole, weight in (lines or {line + END: 1.0}).items():
        character = whole[len(line)]
        weights[character] = weights.get(character, 0.0) + weight
    logits = np.full(256, -30.0, np.float32)
    for character, weight in weights.items():
        logits[TOKENS[character]] = math.log(weight)
    return logits


class ScriptedModel:
    """`radixgen.model.base.Model`; the 'KV' of a slot is the text that ends there."""

    name = "scripted"
    vocab_size = 256
    max_model_len = 4096
    eos_token_ids: frozenset[int] = frozenset()
    kv_bytes_per_token = 1
    kv_bytes_read = 0
    kv_bytes_unshared = 0

    def __init__(self, script: Script) -> None:
        self.script = script
        self._texts: list[str] = []

    def allocate(self, slots: int) -> None:
        self._texts = [""] * slots

    def run(
        self, plan: Plan, token_ids: NDArray[np.int64], slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Tensor:
        texts: list[str] = []
        for row, before in enumerate(_slots_before(plan)):
            text = (self._texts[before] if before >= 0 else "") + CHARACTERS[token_ids[row]]
            texts.append(text)
            if slots[row] >= 0:
                self._texts[slots[row]] = text
        return torch.from_numpy(np.stack([next_logits(self.script, texts[row]) for row in logit_rows]))

    def release(self) -> None:
        self._texts = []


def _slots_before(plan: Plan) -> list[int]:
    """Where each row's predecessor stands; -1 where it has none."""
    found = [-1] * plan.num_rows
    for (first, last), (begin, end) in zip(plan.unit_segments, plan.unit_rows, strict=True):
        for segment in range(first, last):
            position, length = plan.segment_positions[segment], plan.segment_lengths[segment]
            low, high = plan.segment_rows[segment]
            for row in range(max(low, begin), min(high, end)):
                offset = plan.row_positions[row] - 1 - position
                if 0 <= offset < length:
                    found[row] = int(plan.segment_starts[segment] + offset)
    return found
