"""Scores of a prompt's keys: the attention that they get from the prompt's last rows.

SnapKV (Li et al. 2024, arXiv 2404.14469, section 4): what the end of a prompt attends to is what its answer will.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from radixgen.cache.storage import KVStorage
from radixgen.core import Plan, first_seen
from radixgen.core.plan import ScoredPrompt
from radixgen.kernels.quantized import read
from radixgen.kernels.upload import upload
from radixgen.model.layer_call import LayerAttention, LayerCall


class KeyScorer:
    """Computes the attention of a step by `attend`, and scores the keys of `prompts` in each layer.

    In each query head, attention of the scoring rows to a key is summed, and the key gets the largest sum among its
    neighbours. Its score is the sum over heads and layers. The rows attend to all keys before them, as in the model.
    """

    def __init__(
        self,
        attend: LayerAttention,
        storage: KVStorage,
        plan: Plan,
        prompts: Sequence[ScoredPrompt],
        device: torch.device,
    ) -> None:
        self._attend, self._storage, self._plan, self._prompts = attend, storage, plan, prompts
        self._rows = [upload(prompt.rows, device) for prompt in prompts]
        self._slots = [upload(prompt.slots, device) for prompt in prompts]
        self._sums = [torch.zeros(prompt.num_scored, device=device) for prompt in prompts]

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        result = self._attend(call)
        for prompt, rows, slots, sums in zip(self._prompts, self._rows, self._slots, self._sums, strict=True):
            if prompt.num_scored:
                q, keys = call.q[rows], read(self._storage.keys[call.layer], slots, call.q.dtype)
                sums += attention_scores(call, q, keys, self._plan.row_positions[prompt.rows], prompt)
        return result

    def scores(self) -> list[NDArray[np.float32]]:
        """Return the scores of each prompt's keys, `[scored]`, after the last layer."""
        return [sums.cpu().numpy() for sums in self._sums]


def attention_scores(
    call: LayerCall, q: Tensor, keys: Tensor, positions: NDArray[np.int32], prompt: ScoredPrompt
) -> Tensor:
    """Return the scores of one layer, float32 `[scored]`.

    q `[rows, q_heads, head_dim]`, of rows at `positions` `[rows]`; keys `[tokens, kv_heads, head_dim]`, by position.
    """
    count, group = prompt.slots.size, q.shape[1] // keys.shape[1]
    first = positions * 0 if call.window is None else first_seen(call.window, positions)
    own, first_key = (upload(places.astype(np.int64), q.device)[:, None] for places in (positions, first))
    place = torch.arange(count, device=q.device)
    hidden = (place > own) | (place < first_key)
    total = torch.zeros(prompt.num_scored, device=q.device)
    for head in range(keys.shape[1]):  # one at a time, so that little memory is needed
        queries = q[:, head * group : (head + 1) * group].float().transpose(0, 1)
        logits = queries @ keys[:, head].float().T * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits = logits.masked_fill(hidden, -torch.inf)
        if call.sinks is not None:
            sinks = call.sinks[head * group : (head + 1) * group].float()
            logits = torch.cat([logits, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
        sums = logits.softmax(-1).sum(1)[:, : prompt.num_scored]
        total += torch.nn.functional.max_pool1d(sums[None], prompt.kernel, 1, prompt.kernel // 2)[0].sum(0)
    return total
