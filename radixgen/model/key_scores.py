"""Scores of a prompt's keys: the attention that the prompt's last rows pay to them.

After SnapKV (Li et al. 2024, arXiv 2404.14469, section 4), where each head keeps the keys to which these rows attend
most in sum. Here all layers and heads keep the same keys, so that a key counts as much as it does to the row, head and
layer that needs it most: in a sum, the few heads that look up single facts would be outvoted.
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
    """Computes the attention of a step by `attend`, and scores the keys of `prompts`.

    A key's score is the largest attention that any scoring row pays, in any query head and layer, to it or to a
    neighbour. The rows attend to all keys before them, as in the model.
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
        self._largest = [torch.zeros(prompt.slots.size, device=device) for prompt in prompts]

    def __call__(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        result = self._attend(call)
        for prompt, rows, slots, largest in zip(self._prompts, self._rows, self._slots, self._largest, strict=True):
            q, keys = call.q[rows], read(self._storage.keys[call.layer], slots, call.q.dtype)
            weights = largest_weights(call, q, keys, self._plan.row_positions[prompt.rows])
            torch.maximum(largest, weights, out=largest)
        return result

    def scores(self) -> list[NDArray[np.float32]]:
        """Return the scores of each prompt's keys, `[scored]`, after the last layer."""
        pairs = zip(self._prompts, self._largest, strict=True)
        return [_among_neighbours(largest[: prompt.num_scored], prompt.kernel) for prompt, largest in pairs]


def _among_neighbours(weights: Tensor, kernel: int) -> NDArray[np.float32]:
    padded = torch.nn.functional.pad(weights, (kernel // 2, kernel // 2))
    return padded.unfold(0, kernel, 1).amax(1).cpu().numpy() if len(weights) else np.empty(0, np.float32)


def largest_weights(call: LayerCall, q: Tensor, keys: Tensor, positions: NDArray[np.int32]) -> Tensor:
    """Return the largest weight that each key gets in one layer, float32 `[keys]`.

    q `[rows, q_heads, head_dim]`, of rows at `positions` `[rows]`; keys `[keys, kv_heads, head_dim]`, by position.
    """
    group = q.shape[1] // keys.shape[1]
    first = positions * 0 if call.window is None else first_seen(call.window, positions)
    own, first_key = (upload(places.astype(np.int64), q.device)[:, None] for places in (positions, first))
    place = torch.arange(len(keys), device=q.device)
    hidden = (place > own) | (place < first_key)
    largest = torch.zeros(len(keys), device=q.device)
    for head in range(keys.shape[1]):  # one at a time, so that little memory is needed
        queries = q[:, head * group : (head + 1) * group].float().transpose(0, 1)
        logits = queries @ keys[:, head].float().T * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits = logits.masked_fill(hidden, -torch.inf)
        if call.sinks is not None:
            sinks = call.sinks[head * group : (head + 1) * group].float()
            logits = torch.cat([logits, sinks[:, None, None].expand(-1, len(q), 1)], dim=-1)
        largest = torch.maximum(largest, logits.softmax(-1).amax((0, 1))[: len(keys)])
    return largest
