"""The token-stamp oracle with a script: it checks every slot that it is told to read, and writes what a script says."""

from typing import Any

import numpy as np
import torch
from oracle import ROOT, StampModel, extend
from scripted_model import CHARACTERS, Script, next_logits, tokenizer

__all__ = ["ScriptedStamps", "tokenizer"]


class ScriptedStamps(StampModel):
    """Logits are the script's, of the text that a row's stamp stands for."""

    def __init__(self, script: Script, max_model_len: int = 1024) -> None:
        super().__init__(256, max_model_len)
        self.script = script
        self._texts = {ROOT: ""}

    def _write(self, tokens: list[int], slots: list[int], reads: Any, lost: Any) -> list[bytes]:
        stamps = super()._write(tokens, slots, reads, lost)
        before = reads.slots[reads.last - 1].tolist()
        positions = reads.positions[reads.last].tolist()
        for row, token in enumerate(tokens):
            if row in lost:
                continue
            parent = self._stamp_at(before[row]) if positions[row] else ROOT
            assert extend(parent, token) == stamps[row]
            self._texts[stamps[row]] = self._texts[parent] + CHARACTERS[token]
        self._row_stamps = stamps
        return stamps

    def _compute(self, plan: Any, token_ids: Any, slots: Any, logit_rows: Any, lost: Any = ()) -> torch.Tensor:
        super()._compute(plan, token_ids, slots, logit_rows, lost)
        texts = [self._texts[self._row_stamps[row]] for row in logit_rows.tolist()]
        if not texts:
            return torch.empty(0, 256)
        return torch.from_numpy(np.stack([next_logits(self.script, text) for text in texts]))
