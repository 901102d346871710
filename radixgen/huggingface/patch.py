"""`patch`: let an engine serve `model.generate` of a transformers model."""

from functools import partial, update_wrapper
from inspect import signature
from threading import Lock
from types import MethodType
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from radixgen.core import InvalidRequest, Limits
from radixgen.core.errors import check_boolean
from radixgen.engine.engine import Engine
from radixgen.huggingface.arguments import (
    beam_search_params,
    check_config,
    check_fields,
    check_prepared,
    draw_seeds,
    refuse_arguments,
    sampling_params,
    transformers_names,
    unpadded,
)
from radixgen.huggingface.decoding import Decoding, search_beams
from radixgen.model.shared_weights import check_hooks, share_weights, weight_places, weight_versions

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
    from transformers.generation import BaseStreamer
    from transformers.generation.stopping_criteria import StopStringCriteria
    from transformers.utils import ModelOutput

_MODEL_OPTIONS = ("device", "dtype", "load_format", "model", "tensor_parallel_size", "tokenizer")
"""Options of `Engine` that the model itself decides."""


class Patch:
    """An engine in the place of a model's `generate`, until `unpatch`. A context manager.

    Calls from several threads run one after another. The model itself stays as it was: its forward pass, training and
    `save_pretrained` need no `unpatch`. A `copy.deepcopy` of the model is not patched.
    """

    def __init__(self, model: "PreTrainedModel", keep_cache: bool, options: dict[str, Any]) -> None:
        self._model = model
        self._keep_cache = keep_cache
        self._options = options
        self._original = model.generate
        self._lock = Lock()
        self._start_engine()
        update_wrapper(self, self._original)
        vars(model)["generate"] = self

    @property
    def engine(self) -> Engine:
        """The engine, for `stats` and other reports. It is another one after the model was moved or converted."""
        return self._engine

    def unpatch(self) -> None:
        """Give the model its own `generate` back, and close the engine. May be called twice."""
        if vars(self._model).get("generate") is self:
            del vars(self._model)["generate"]
        with self._lock:
            self._engine.close()

    def __call__(self, *arguments: Any, **options: Any) -> "Tensor | ModelOutput":
        """As `generate` of the model."""
        bound = signature(self._original).bind(*arguments, **options).arguments
        given = bound.pop("kwargs", {}) | bound
        refuse_arguments(given)
        check_fields(given)
        decode = partial(self._decode, streamer=given.get("streamer"), stop_strings=self._take_stop_strings(given))
        given["custom_generate"] = _as_decoding_method(decode)
        with self._lock, transformers_names():
            self._refresh_engine()
            outputs: Tensor | ModelOutput = self._original(**given)
        return outputs

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.unpatch()

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodType:
        """A copied model gets the `generate` of its class."""
        return MethodType(type(self._model).generate, memo.get(id(self._model), self._model))

    def _start_engine(self) -> None:
        self._places: tuple[object, ...] = ()
        self._engine = Engine(share_weights(self._model), **self._options)
        self._places = weight_places(self._model)  # an engine on a GPU puts weights side by side
        self._versions = weight_versions(self._model)

    def _refresh_engine(self) -> None:
        """Make a new engine if weights were moved, and evict the KV of weights that may have changed."""
        check_hooks(self._model)
        if weight_places(self._model) != self._places:
            self._engine.close()
            self._start_engine()
        versions = weight_versions(self._model)
        if not self._keep_cache or versions != self._versions:
            self._engine.reset_prefix_cache()
        self._versions = versions

    def _take_stop_strings(self, given: dict[str, Any]) -> "StopStringCriteria | None":
        """Take stop strings and tokenizer out of the arguments: transformers does not pass the tokenizer on."""
        from transformers.generation.stopping_criteria import StopStringCriteria

        tokenizer = given.pop("tokenizer", None)
        configs = (given.get("generation_config"), self._model.generation_config)
        choices = (given.get("stop_strings"), *(getattr(config, "stop_strings", None) for config in configs))
        strings = next((choice for choice in choices if choice is not None), None)
        if strings is None:
            return None
        if tokenizer is None:
            raise InvalidRequest("tokenizer", None, "must be the model's tokenizer, for stop_strings")
        given["stop_strings"] = None
        return StopStringCriteria(tokenizer, strings)

    def _decode(
        self,
        input_ids: Tensor,
        processors: "LogitsProcessorList",
        criteria: "StoppingCriteriaList",
        config: "GenerationConfig",
        inputs: dict[str, Any],
        *,
        streamer: "BaseStreamer | None",
        stop_strings: "StopStringCriteria | None",
    ) -> "Tensor | ModelOutput":
        """Generate for what transformers has prepared: `input_ids` `[rows, tokens]`, each prompt once for each sequence
        or beam.
        """
        check_config(config, streamer=streamer, stop_strings=stop_strings)
        check_prepared(processors, criteria, inputs)
        prompts = unpadded(input_ids, inputs.get("attention_mask"))
        if (config.num_beams or 1) > 1:
            return self._search_beams(input_ids, prompts, config)
        if streamer is not None and len(prompts) > 1:
            raise InvalidRequest("streamer", streamer, f"is for one sequence, and there are {len(prompts)}")
        wants_logits = bool(config.return_dict_in_generate and (config.output_scores or config.output_logits))
        decoding = Decoding(
            self._engine, input_ids, streamer=streamer, stop_strings=stop_strings, keep_logits=wants_logits
        )
        seeds = draw_seeds(len(prompts)) if config.do_sample else [0] * len(prompts)
        decoding.run(prompts, [sampling_params(config, input_ids.shape[1], seed) for seed in seeds])
        return decoding.output(config, processors)

    def _search_beams(
        self, input_ids: Tensor, prompts: list[list[int]], config: "GenerationConfig"
    ) -> "Tensor | ModelOutput":
        from transformers.generation import GenerateBeamDecoderOnlyOutput

        params = beam_search_params(config, input_ids.shape[1])
        sequences, scores = search_beams(self._engine, input_ids, prompts, params, config)
        if not config.return_dict_in_generate:
            return sequences
        return GenerateBeamDecoderOnlyOutput(sequences=sequences, sequences_scores=scores)


def patch(model: "PreTrainedModel", *, keep_cache: bool = False, **engine_options: Any) -> Patch:
    """Let an engine serve `model.generate`, with the same arguments and outputs. Prompts of a batch, their sequences
    and beams share prefixes.

    ```python
    with radixgen.patch(model):
        outputs = model.generate(**tokenizer(prompts, return_tensors="pt", padding=True), max_new_tokens=32)
    ```

    keep_cache: keep prefixes cached from call to call. Changes of the weights that PyTorch counts, such as those of
        `torch.optim` and `load_state_dict`, still evict them; others, such as writes to `.data`, must not happen.
    engine_options: options of `Engine`, such as `kv_tokens`, `max_model_len` or `seed`.

    The engine uses the model's weights where they are. Draws depend on torch's generator through a seed for each
    sequence: they are reproducible, but other tokens than those of transformers. docs/transformers.md lists the
    arguments; all others are refused by name with `InvalidRequest`, a `ValueError`.

    Raises `InvalidRequest`, `UnsupportedModel`.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise InvalidRequest("model", type(model).__name__, "must be a transformers model with generate")
    if "generate" in vars(model):
        raise InvalidRequest("model", type(model).__name__, "has another generate already: unpatch it first")
    for name in _MODEL_OPTIONS:
        if name in engine_options:
            raise InvalidRequest(name, engine_options[name], "is decided by the model; leave it out")
    check_boolean("keep_cache", keep_cache)
    limits = Limits(max_waiting=2**31 - 1, max_waiting_tokens=2**62)
    return Patch(model, keep_cache, {"limits": limits} | engine_options)


def unpatch(model: "PreTrainedModel") -> None:
    """Undo `patch`; does nothing to a model that is not patched."""
    patched = vars(model).get("generate")
    if isinstance(patched, Patch):
        patched.unpatch()


def _as_decoding_method(decode: Any) -> Any:
    """Return `decode` with the signature of transformers' decoding methods."""

    def decoding_method(
        model: "PreTrainedModel",
        input_ids: Tensor,
        logits_processor: "LogitsProcessorList",
        stopping_criteria: "StoppingCriteriaList",
        generation_config: "GenerationConfig",
        **model_kwargs: Any,
    ) -> Any:
        return decode(input_ids, logits_processor, stopping_criteria, generation_config, model_kwargs)

    return decoding_method
