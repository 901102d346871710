"""transformers' modelling code on packed rows of a tree instead of padded sequences.

One attention function is registered with transformers' `AttentionInterface`. It passes every layer's queries, keys and
values to the `TreeModel` that owns the module; the rest of the model is unchanged. A second one is used while the model
is probed: it reads each layer's mask, and compares our attention with the model's own.
"""

import itertools
import logging
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from radixgen.cache.storage import LayerShape
from radixgen.core import InvalidRequest, UnsupportedModel, Window
from radixgen.core.settings import keep_compiled
from radixgen.kernels.geometry import Geometry
from radixgen.model.attention_op import handle_attention, layer_attention, register
from radixgen.model.collectives import silent
from radixgen.model.compiler import compilable_modules, compiler_options, is_compiler_error
from radixgen.model.experts import expert_layers, restore_experts, use_expert_gemm
from radixgen.model.fused_linear import fuse_linears, restore_linears
from radixgen.model.last_block import KVWriteDone, LastBlock, insert_last_block, remove_last_block
from radixgen.model.layer_call import LayerAttention, LayerCall
from radixgen.model.masks import MaskError, MaskReader, make_mask
from radixgen.model.reference import TOLERANCE, causal_attention, causal_over, close_to, sees
from radixgen.model.rotary import fix_rotary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

# Must not contain "flash": transformers would then pass other arguments.
IMPLEMENTATION = "radixgen"
READING = "radixgen_reading"
"""Name of the implementation that reads masks."""
_LONGEST_PROOF = 256
"""Rows of the longest sequence used to probe a model."""
_COMPILED_ROWS = (1, 2, 15, 16, 100)
"""Row counts that `torch.compile` specializes on: one, few, and multiples of 16."""


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attention)
    AttentionInterface.register(READING, _reading_attention)
    AttentionMaskInterface.register(READING, make_mask)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers; q, k, v `[1, heads, rows, head_dim]`."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
        return layer_attention(query, key, value, scale, softcap, s_aux), None
    owner: TreeModel = module.__dict__["radixgen_owner"]
    return owner.answer(owner.layer_of(module), query, key, value, scale, softcap, s_aux), None


def _reading_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """As `_attention`, over one sequence: read the layer's mask, and compare with the model's own attention."""
    owner: TreeModel = module.__dict__["radixgen_owner"]
    owner.read_layer(module, attention_mask, query.shape[2], options)
    out, _ = _attention(module, query, key, value, attention_mask, **options)
    theirs = _own_attention(module, query, key, value, owner.windows[-1], options)
    if theirs is not None and float((out - theirs).abs().max()) > TOLERANCE * float(theirs.abs().max()) + 1e-6:
        raise UnsupportedModel(f"{owner.name}: a layer's own attention is more than softmax, scale, soft cap and sinks")
    return out, None


def _own_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, window: Window | None, options: dict[str, Any]
) -> Tensor | None:
    """Run the model's own eager attention; None if its code has none."""
    own = getattr(sys.modules.get(type(module).__module__), "eager_attention_forward", None)
    if own is None:
        return None
    place = torch.arange(query.shape[2], device=query.device)
    hidden = ~sees(window, place)[None, None]
    mask = torch.zeros(hidden.shape, dtype=query.dtype, device=query.device)
    mask = mask.masked_fill(hidden, torch.finfo(query.dtype).min)
    theirs: Tensor = own(module, query, key, value, mask, **options)[0]
    return theirs


class TreeModel:
    """A causal language model whose attention is computed by `attend`.

    Construction probes the model: one sequence shows the shape of every layer's K and V, and three sequences, packed
    and alone, show whether rows affect each other only through attention. Raises `UnsupportedModel` with the reason
    otherwise.
    """

    def __init__(
        self, model: "PreTrainedModel", name: str, max_model_len: int | None, max_step_tokens: int = 2048
    ) -> None:
        """`max_step_tokens`: maximum rows of one `forward`."""
        self.model = model
        self.name = f"{name} ({model.config.model_type})"
        self.device = model.device
        self.attend: LayerAttention = self._no_attend
        self._layers: dict[nn.Module, int] = {}
        self.windows: list[Window | None] = []
        """Window of each layer."""
        self.geometry: Geometry | None = None
        config = model.config.get_text_config()
        embedding = model.get_input_embeddings()  # a rank may have only some of its rows
        self.vocab_size = int(getattr(embedding, "num_embeddings", 0) or embedding.weight.shape[0])
        if model.config.is_encoder_decoder:
            raise UnsupportedModel(f"{self.name}: an encoder-decoder model")
        self._last_block: LastBlock | None = None
        self._write: Callable[[LayerCall], None] | None = None
        self._compiled: list[nn.Module] = []
        self._may_uncompile = True
        self._former_rotary: list[tuple[nn.Module, Any]] = []
        self._former_attention = model.config._attn_implementation
        _register()
        try:
            model.set_attn_implementation(IMPLEMENTATION)
        except (ValueError, ImportError) as error:
            raise UnsupportedModel(f"{self.name}: {error}") from error
        for module in model.modules():
            module.__dict__["radixgen_owner"] = self
        try:
            reach = max(max_model_len or getattr(config, "max_position_embeddings", None) or _LONGEST_PROOF, 1)
            self._reader = MaskReader(reach, self.device)
            self._proof_len = _proof_length(config, reach)
            self.layer_shapes = self._probe(config)
            self.max_model_len = _context(config, max_model_len)
            self._former_rotary = fix_rotary(model, self.name, self.max_model_len)
            self._prove_packing()
            self._prove_positions(max(self.max_model_len, max_step_tokens))
            self._prove_last_block()
        except BaseException:
            self.release()
            raise

    @property
    def picks_rows(self) -> bool:
        """Whether the last block can skip rows without logits."""
        return self._last_block is not None

    @torch.inference_mode()
    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        logit_rows: Tensor,
        attend: LayerAttention,
        write: Callable[[LayerCall], None] | None = None,
    ) -> Tensor:
        """Run packed rows: `token_ids` and `positions` int64 `[rows]`, `logit_rows` int64 `[n]`.

        With `write`, which requires `picks_rows`, the last block computes only `logit_rows`, in ascending order:
        `write` stores the K and V of all rows, then `attend` is called with the rows of `logit_rows` alone.

        Returns logits `[n, vocab]` of `logit_rows` in the model's own dtype.
        """
        self.attend, self._write = attend, write
        try:
            return self._forward(token_ids, positions, logit_rows)
        except RuntimeError as error:
            if not (self._compiled and self._may_uncompile and is_compiler_error(error)):
                raise
            reason = " ".join(str(error).split("\n\n")[0].split())
            logger.warning("%s: torch.compile failed, so that it runs uncompiled from now on: %s", self.name, reason)
            self.uncompile()
            return self._forward(token_ids, positions, logit_rows)
        finally:
            self.attend, self._write = self._no_attend, None

    def trace(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor, attend: LayerAttention) -> Tensor:
        """As `forward`, for `torch.export`."""
        self.attend = attend
        try:
            return self._forward(token_ids, positions, logit_rows)
        finally:
            self.attend = self._no_attend

    def _forward(self, token_ids: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        layers = itertools.chain(range(len(self.windows)), itertools.repeat(len(self.windows) - 1))
        kept: Tensor | int = logit_rows
        if self._write is not None and self._last_block is not None:
            self._last_block.rows, kept = logit_rows, 0
        try:
            with handle_attention(lambda *arguments: self.answer(next(layers), *arguments)):
                output = self.model(
                    input_ids=token_ids.unsqueeze(0),
                    position_ids=positions.unsqueeze(0),
                    use_cache=False,
                    logits_to_keep=kept,
                )
        finally:
            if self._last_block is not None:
                self._last_block.rows = None
        logits: Tensor = output.logits[0]
        return logits

    def answer(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """As `radixgen.model.attention_op.AttentionHandler`, for one layer. Raises `KVWriteDone` if only K and V are
        needed.
        """
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        call = LayerCall(layer, q, k, v, scale, self.windows[layer], softcap, sinks)
        if self._write is not None and self._last_block is not None and self._last_block.storing:
            self._write(call)
            raise KVWriteDone
        return self.attend(call)[0].contiguous().unsqueeze(0)

    def compile_blocks(self) -> None:
        """Let `torch.compile` fuse the code between the matrix products of each block and around the blocks, for any
        number of rows.

        The first passes are slow unless the cache directory has their results. Attention is a single operator to the
        compiler. If compiling fails, in any later pass, a warning is logged and the model runs uncompiled from then on.
        """
        from torch._inductor.runtime.cache_dir_utils import default_cache_dir

        keep_compiled(default_cache_dir())
        options = compiler_options(self.device)
        register()
        for module in compilable_modules(self.model):
            module.compile(dynamic=True, options=options)
            self._compiled.append(module)

    def compiles(self) -> bool:
        """Return whether the blocks compile for one, a few and many rows, tested by passes without communication.

        Later failures are raised, because a rank that continued uncompiled would communicate at other points than the
        rest.
        """
        with silent():
            for rows in _COMPILED_ROWS:
                sequence = self._sequence(0, min(rows, self.max_model_len))
                self._logits([sequence], causal_over([sequence]))
        self._may_uncompile = False
        return bool(self._compiled)

    def fuse_linears(self) -> None:
        """Fuse layers with the same input, and use our kernel for experts."""
        fuse_linears(self.model)
        use_expert_gemm(self.model)

    def layer_of(self, module: nn.Module) -> int:
        """Return the index of an attention module in the order of the first forward pass."""
        if module not in self._layers:
            self._layers[module] = len(self._layers)
        return self._layers[module]

    def read_layer(self, module: nn.Module, mask: Tensor | None, rows: int, options: dict[str, Any]) -> None:
        """Derive the next layer's window from its mask. Raises `UnsupportedModel`."""
        if module in self._layers:
            raise UnsupportedModel(f"{self.name}: a layer attends more than once")
        if mask is None and not options.get("is_causal", getattr(module, "is_causal", True)):
            raise UnsupportedModel(f"{self.name}: a layer is not causal")
        self.windows.append(self._reader.window_of(mask, rows))
        self.layer_of(module)

    def uncompile(self) -> None:
        """Undo `compile_blocks`."""
        for module in self._compiled:
            module._compiled_call_impl = None
        self._compiled.clear()

    def release(self) -> None:
        """Restore the model to its original state."""
        self.uncompile()
        remove_last_block(self.model)
        restore_linears(self.model)
        restore_experts(self.model)
        for module in self.model.modules():
            module.__dict__.pop("radixgen_owner", None)
        for module, kinds in self._former_rotary:
            module.rope_type = kinds
        self.model.set_attn_implementation(self._former_attention)

    def _probe(self, config: Any) -> list[LayerShape]:
        """Return the KV shape of each layer, and record its window, by running one sequence longer than all windows."""
        shapes: dict[int, LayerShape] = {}

        def record(call: LayerCall) -> tuple[Tensor, Tensor]:
            kv_heads, head_dim = call.k.shape[1:]
            shapes[call.layer] = LayerShape(kv_heads, head_dim, call.v.shape[2], call.k.dtype)
            self.geometry = self.geometry or Geometry.of(call.q, call.k, call.v)
            return causal_attention(call, [self._proof_len])

        self.model.set_attn_implementation(READING)
        try:
            with self._reader.reading():
                self._try(lambda: self._logits([self._sequence(0, self._proof_len)], record))
        finally:
            self.model.set_attn_implementation(IMPLEMENTATION)
        expected = int(config.num_hidden_layers)
        if len(shapes) != expected:
            reason = f"{len(shapes)} of its {expected} layers attend through AttentionInterface"
            raise UnsupportedModel(f"{self.name}: {reason}; the others keep a state of their own")
        return [shapes[layer] for layer in range(expected)]

    def _prove_packing(self) -> None:
        """Check that three sequences, one of them longer than every window, give the same logits packed as alone.

        In half precision, rounding alone can send a row to another expert, and grows over many layers. There it
        suffices that the logits of a sequence stay the same while the tokens of all others change.
        """
        sequences = [self._sequence(a, n) for a, n in ((3, self._proof_len), (5, 2), (3, 3))]
        packed = self._last_logits(sequences)
        alone = [self._last_logits([sequence])[0] for sequence in sequences]
        if all(map(close_to, packed, alone)):
            return
        if expert_layers(self.model) or packed[0].element_size() < 4:
            others = [self._sequence(sequence[0] + 8, len(sequence)) for sequence in sequences]
            changed = [self._last_logits([*others[:i], sequences[i], *others[i + 1 :]])[i] for i in range(3)]
            if all(map(close_to, packed, changed)):
                return
        reason = "packed rows change each other's logits, so something besides attention mixes them"
        raise UnsupportedModel(f"{self.name}: {reason}")

    def _last_logits(self, sequences: list[list[int]]) -> list[Tensor]:
        """Return the logits of the last row of each packed sequence."""
        logits = self._try(lambda: self._logits(sequences, causal_over(sequences)))
        return [rows[-1] for rows in torch.split(logits, [len(sequence) for sequence in sequences])]

    def _prove_positions(self, reach: int) -> None:
        """Check that a row's result depends on `position_ids` and not on its index in the step, up to `reach` rows.

        transformers offsets rows by the length of the cache; here an empty cache claims a length.
        """
        from transformers import DynamicCache

        class OffsetCache(DynamicCache):  # type: ignore[misc]
            def get_seq_length(self, *_: Any, **__: Any) -> int:
                return max(reach - len(tokens), 0)

            def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
                return key, value

        tokens = self._sequence(3, 4)

        def rows(**options: Any) -> list[Tensor]:
            calls: list[Tensor] = []

            def record(call: LayerCall) -> tuple[Tensor, Tensor]:
                calls.extend((call.q, call.k, call.v))
                return causal_attention(call, [1] * len(tokens))

            self._run(torch.tensor([tokens], device=self.device), record, **options)
            return calls

        alone = rows(use_cache=False)
        later = rows(use_cache=True, past_key_values=OffsetCache())
        for first, second in zip(alone, later, strict=True):
            if float((first - second).abs().max()) > 1e-3 * float(first.abs().max()):
                reason = f"it counts positions by itself, which is seen at {reach} tokens"
                raise UnsupportedModel(f"{self.name}: {reason}; a smaller max_model_len may be possible")

    def _prove_last_block(self) -> None:
        """Let the last block skip rows without logits, if that leaves the other rows' logits unchanged."""
        (last,) = [module for module, layer in self._layers.items() if layer == len(self.windows) - 1]
        self._last_block = insert_last_block(self.model, last)
        if self._last_block is None:
            return
        sequences = [self._sequence(a, n) for a, n in ((3, self._proof_len), (5, 2), (3, 3))]
        rows = torch.tensor([self._proof_len - 1, self._proof_len, self._proof_len + 4], device=self.device)
        stored: list[LayerCall] = []

        def attend(call: LayerCall) -> tuple[Tensor, Tensor]:
            if not stored:
                return causal_attention(call, [len(sequence) for sequence in sequences])
            q = torch.zeros_like(stored[0].q)
            q[rows] = call.q
            out, lse = causal_attention(replace(stored[0], q=q), [len(sequence) for sequence in sequences])
            return out[rows], lse[rows]

        expected = self._logits(sequences, causal_over(sequences))[rows]
        try:
            actual = self._logits(sequences, attend, rows, stored.append)
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            logger.info("%s: its last block computes all rows: %s", self.name, error)
            actual = torch.full_like(expected, torch.nan)
        if len(stored) != 1 or not all(map(close_to, actual, expected)):
            remove_last_block(self.model)
            self._last_block = None

    @torch.inference_mode()
    def _run(self, token_ids: Tensor, attend: LayerAttention, **options: Any) -> None:
        """Run one forward pass at position 0 with transformers' own `options`."""
        self.attend = attend
        try:
            self.model(input_ids=token_ids, position_ids=torch.zeros_like(token_ids), **options)
        finally:
            self.attend = self._no_attend

    def probe(self) -> Tensor:
        """Return the logits of a short sequence, `[n, vocab]`."""
        sequence = self._sequence(3, min(4, self.max_model_len))
        return self._logits([sequence], causal_over([sequence]))

    def _sequence(self, first: int, length: int) -> list[int]:
        return [token % self.vocab_size for token in range(first, first + length)]

    def _logits(
        self,
        sequences: list[list[int]],
        attend: LayerAttention,
        logit_rows: Tensor | None = None,
        write: Callable[[LayerCall], None] | None = None,
    ) -> Tensor:
        """Run packed sequences and return the logits of all rows, or of `logit_rows`."""
        tokens = [token for sequence in sequences for token in sequence]
        positions = [position for sequence in sequences for position in range(len(sequence))]
        rows = torch.arange(len(tokens), device=self.device) if logit_rows is None else logit_rows
        token_ids = torch.tensor(tokens, device=self.device)
        return self.forward(token_ids, torch.tensor(positions, device=self.device), rows, attend, write)

    def _try(self, run: Callable[[], Tensor]) -> Tensor:
        try:
            return run()
        except UnsupportedModel:
            raise
        except MaskError as error:
            raise UnsupportedModel(f"{self.name}: {error}") from error
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError, KeyError) as error:
            raise UnsupportedModel(f"{self.name}: it does not run on packed rows: {error}") from error

    def _no_attend(self, call: LayerCall) -> tuple[Tensor, Tensor]:
        raise UnsupportedModel(f"{self.name}: radixgen holds this model; close its engine first")


def _context(config: Any, requested: int | None) -> int:
    """Return the maximum length of a path in tokens. Raises `InvalidRequest`."""
    longest = getattr(config, "max_position_embeddings", None)
    if requested is None:
        if longest is None:
            raise InvalidRequest("max_model_len", requested, "must be given: the model states no maximum")
        return int(longest)
    if requested < 1 or (longest is not None and requested > longest):
        raise InvalidRequest("max_model_len", requested, f"must be from 1 to the model's own {longest}")
    return requested


_LOCAL = re.compile("window|chunk|local|block|sparse|stride|keep")


def _proof_length(config: Any, max_model_len: int) -> int:
    """Return the length of a probe that exceeds the local sizes in the config, as far as is feasible."""
    sizes = [value for key, value in config.to_dict().items() if _LOCAL.search(key) and type(value) is int]
    longest = max((size for size in sizes if 1 < size <= _LONGEST_PROOF - 3), default=1)
    return min(longest + 3, max_model_len)
