"""`Engine`: requests in, tokens out, one radix tree in between."""

import os
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from jinja2 import TemplateError

from radixgen.cache import ExtentPool, RadixTree, TokenArray
from radixgen.core import (
    CompletionOutput,
    DuplicateRequest,
    EngineClosed,
    InvalidRequest,
    Limits,
    PromptTooLong,
    RadixgenError,
    RequestOutput,
    SamplingParams,
    Stats,
    UnknownRequest,
    UnsupportedModel,
)
from radixgen.detokenize import Detokenizer
from radixgen.model.loader import LoadedModel, load, resolve_device
from radixgen.model.packed import TreeModel
from radixgen.model.runner import ModelRunner
from radixgen.sampling import Draw, Sampled, sample
from radixgen.scheduler.batch import Batch, Scheduler
from radixgen.scheduler.planner import PLAN_MODES, PlanMode, Planner
from radixgen.scheduler.sequence import Request, Sequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Prompt = str | Seq[int] | TokenArray
Messages = Seq[Mapping[str, Any]]
Progress = Callable[[int, int], None]

_CPU_SHARE, _CUDA_SHARE = 0.25, 0.85
"""How much of the free memory the KV pool takes where `kv_tokens` does not say."""


class Engine:
    """Serves one model. Not thread-safe: one thread submits and steps.

    ```python
    with Engine("smollm2") as engine:
        for output in engine.generate(["Hello", "Hello there"], SamplingParams(max_tokens=8)):
            print(output.outputs[0].text)
    ```
    """

    def __init__(
        self,
        model: "str | Path | PreTrainedModel",
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        attention: str = "auto",
        plan: PlanMode = "auto",
        share: bool = True,
        kv_tokens: int | None = None,
        max_step_tokens: int = 2048,
        max_model_len: int | None = None,
        seed: int = 0,
        limits: Limits | None = None,
        debug: bool = False,
    ) -> None:
        """
        model: `"smollm2"`, a directory, a `.gguf` file, a hub id, or a transformers model (borrowed until
        `close`).
        tokenizer: for a model given as an object; a model without one serves token ids.
        dtype: `"auto"` keeps the checkpoint's; else `float32`, `bfloat16` or `float16`.
        attention: `"auto"` or a backend of `radixgen.kernels.BACKENDS`.
        plan: `"auto"`; `"unshared"` reads the same tree one path a row.
        share: False gives every sequence a tree of its own, so that nothing is stored or computed in common.
        kv_tokens: slots of the KV pool; by default what a share of the free memory holds.
        max_step_tokens: rows of one step at the most; longer prompts are computed in chunks.
        max_model_len: longest prompt plus output, in tokens; by default the model's own maximum.
        seed: where a request has no seed of its own, this and its place in the order of submission give one.
        debug: stamp every slot with a hash of its prefix, so that `check()` proves what each reader finds there,
            and check before every step that its plan names no free slot.

        Raises `ModelNotFound`, `UnsupportedModel`, `InvalidRequest`.
        """
        _check_options(plan, max_step_tokens, kv_tokens)
        loaded = _loaded(model, tokenizer, dtype, device)
        self.limits = limits or Limits()
        self.tokenizer = loaded.tokenizer
        self.share = share
        self.seed = seed
        self._model = TreeModel(loaded.model, loaded.name, max_model_len)
        self.max_model_len = self._model.max_model_len
        slots = kv_tokens or _default_slots(self._model, self.limits)
        self._runner = ModelRunner(self._model, slots, attention)
        self._tree = RadixTree(ExtentPool(slots), stamps=debug)
        self._planner = Planner(self._tree, mode=plan)
        self._scheduler = Scheduler(
            self._tree,
            self._planner,
            max_step_tokens=max_step_tokens,
            max_num_seqs=self.limits.max_num_seqs,
            debug=debug,
        )
        self._eos = _eos_tokens(loaded.model)
        self._requests: dict[str, Request] = {}
        self._detokenizers: dict[Sequence, Detokenizer] = {}
        self._undelivered: list[RequestOutput] = []
        self._serial = 0
        self._steps = 0
        self._generated = 0
        self._closed = False

    # -- whole requests -----------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: SamplingParams | Seq[SamplingParams] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Serve one prompt (a string or token ids) or many as one burst; outputs in the order of the prompts.

        `progress(done, total)` is called after every step with the number of finished requests. All prompts
        are checked before any is admitted. Raises `InvalidRequest`.
        """
        self._ensure_open()
        batch = _as_prompts(prompts)
        each = _as_params(params, len(batch))
        tokens = [self._tokenize(prompt) for prompt in batch]
        for ids, one in zip(tokens, each, strict=True):
            self._check_request(ids, one)
        request_ids = [self.submit(p, q) for p, q in zip(tokens, each, strict=True)]
        mine, done = set(request_ids), dict[str, RequestOutput]()
        try:
            while len(done) < len(request_ids):
                for output in self._step_or_stall():
                    if output.request_id not in mine:
                        self._undelivered.append(output)
                    elif output.finished:
                        done[output.request_id] = output
                if progress is not None:
                    progress(len(done), len(request_ids))
        finally:
            self._abandon(mine - done.keys())
        return [done[request_id] for request_id in request_ids]

    def chat(self, messages: Messages | Seq[Messages], params: SamplingParams | None = None) -> list[RequestOutput]:
        """Serve one conversation, or many as one burst, through the model's chat template.

        A message is `{"role": …, "content": …}`. Raises `InvalidRequest`.
        """
        many = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if many else [messages]
        return self.generate([self.chat_tokens(one) for one in conversations], params)

    def chat_tokens(self, messages: Messages) -> list[int]:
        """The conversation as token ids, ending where the model's answer begins. Raises `InvalidRequest`."""
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise InvalidRequest("messages", "…", "the model has no chat template")
        try:
            ids: list[int] = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except (TemplateError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise InvalidRequest("messages", messages, f"the chat template refuses them: {error}") from error
        return ids

    def decode(self, token_ids: Seq[int]) -> str:
        """Text of `token_ids`, special tokens included; the ids themselves where there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, token_ids))
        text: str = self.tokenizer.decode(token_ids)
        return text

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        cumulative: bool = False,
    ) -> Iterator[RequestOutput]:
        """Serve one prompt and yield what each step adds (or, `cumulative`, everything so far).

        Other requests go on meanwhile. Leaving the iterator early cancels the request. Raises
        `InvalidRequest`.
        """
        request_id = self.submit(prompt, params)
        return self._stream(request_id, cumulative)

    # -- request by request -------------------------------------------------------------------------------

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        namespace: str = "",
    ) -> str:
        """Queue a request and return its id. Higher `priority` goes first; namespaces share nothing.

        Raises `InvalidRequest` or one of its children, and then nothing is queued.
        """
        self._ensure_open()
        params = params or SamplingParams()
        tokens = self._tokenize(prompt)
        self._check_request(tokens, params)
        request_id = self._new_id(request_id)
        for field, text in (("request_id", request_id), ("namespace", namespace)):
            if not isinstance(text, str) or len(text) > self.limits.max_request_id_len:
                limit = f"must be text of at most {self.limits.max_request_id_len} characters"
                raise InvalidRequest(field, text, limit)
        if isinstance(priority, bool) or not isinstance(priority, int):
            raise InvalidRequest("priority", priority, "must be an integer")
        if len(self._scheduler.waiting) + params.n > self.limits.max_waiting:
            limit = f"at most {self.limits.max_waiting} sequences may wait"
            raise InvalidRequest("waiting", len(self._scheduler.waiting) + params.n, limit)
        self._serial += 1
        seed = params.seed if params.seed is not None else _mix(self.seed, self._serial)
        request = Request(request_id, self._serial, tokens, params, seed, priority, namespace)
        for index in range(params.n):
            own = namespace if self.share else f"{namespace}\0{self._serial}.{index}"
            sequence = Sequence(request, index, own)
            request.sequences.append(sequence)
            self._detokenizers[sequence] = Detokenizer(self.tokenizer, tokens.tolist())
        self._requests[request_id] = request
        self._scheduler.add(request)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run one step. Returns every request that gained tokens or ended, with everything generated so
        far.
        """
        self._ensure_open()
        outputs, self._undelivered = self._undelivered, []
        batch = self._scheduler.schedule()
        if batch is None:
            return outputs
        try:
            frozen = self._scheduler.freeze(batch)
            logits = self._runner.run(frozen.plan, frozen.token_ids, frozen.slots, frozen.logit_rows)
        except BaseException:
            self._scheduler.rollback(batch)
            raise
        self._scheduler.commit(batch)
        self._steps += 1
        return outputs + self._retire(batch, logits)

    def cancel(self, request_id: str) -> None:
        """End a request with `finish_reason="abort"`; the next step reports it. Raises `UnknownRequest`."""
        self._ensure_open()
        if request_id not in self._requests:
            raise UnknownRequest("request_id", request_id, "names no live request")
        request = self._requests[request_id]
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                sequence.finish_reason = "abort"
                self._scheduler.drop(sequence)
        self._undelivered.append(self._report(request))

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would run something or report something."""
        return bool(self._requests or self._undelivered)

    # -- the engine itself --------------------------------------------------------------------------------

    @property
    def tree(self) -> RadixTree:
        """The live tree, to be read."""
        return self._tree

    @property
    def kv_dtype(self) -> torch.dtype:
        return self._model.layer_shapes[0].dtype

    def explain(self) -> str:
        """The last step's plan, in bytes of KV over all layers."""
        last = self._planner.last
        shapes = self._model.layer_shapes
        return last.explain(sum(s.bytes_per_token for s in shapes)) if last else "no step has run"

    def stats(self) -> Stats:
        pool, scheduler, runner = self._tree.pool, self._scheduler, self._runner
        return Stats(
            steps=self._steps,
            prompt_tokens=scheduler.prompt_tokens,
            cached_prompt_tokens=scheduler.cached_prompt_tokens,
            computed_prompt_tokens=scheduler.computed_prompt_tokens,
            computed_rows=runner.computed_rows,
            logit_rows=runner.logit_rows,
            generated_tokens=self._generated,
            kv_tokens_total=pool.capacity,
            kv_tokens_used=pool.used - self._tree.reserved_tokens,
            kv_tokens_reserved=self._tree.reserved_tokens,
            kv_tokens_cached=self._tree.evictable_tokens,
            evicted_tokens=self._tree.evicted_tokens,
            preemptions=scheduler.preemptions,
            kv_bytes_read=runner.kv_bytes_read,
            kv_bytes_unshared=runner.kv_bytes_unshared,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
        )

    def check(self) -> None:
        """Assert every invariant: slots have one owner, references are those of the live cursors, counts add
        up.
        """
        self._tree.check()
        cursors: dict[int, int] = {}
        for sequence in self._scheduler.running:
            assert sequence.cursor is not None and sequence.finish_reason is None
            node = sequence.cursor.held
            cursors[node.id] = cursors.get(node.id, 0) + 1
            assert np.array_equal(node.path_tokens(), sequence.tokens()), "a cursor left its tokens"
            assert node.namespace == sequence.namespace
        for node in self._tree.nodes():
            assert node.lock_count == cursors.get(node.id, 0), f"{node} has a lock without a cursor"
        for sequence in self._scheduler.waiting:
            assert sequence.cursor is None and sequence.finish_reason is None
        live = {s for r in self._requests.values() for s in r.sequences if s.finish_reason is None}
        assert live == {*self._scheduler.running, *self._scheduler.waiting}

    def reset_prefix_cache(self) -> int:
        """Drop everything cached that no live request holds. Returns the tokens dropped."""
        self._ensure_open()
        return self._tree.reset()

    def close(self) -> None:
        """Release the model and the KV pool; live requests end without a report. May be called twice."""
        if not self._closed:
            self._closed = True
            self._model.release()
            self._requests.clear()
            self._runner.storage.keys.clear()
            self._runner.storage.values.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------------------

    def _retire(self, batch: Batch, logits: torch.Tensor) -> list[RequestOutput]:
        """Draw tokens, end the sequences that are done, move the others' cursors."""
        readers = [(row, s) for row, group in enumerate(batch.readers.values()) for s in group]
        drawn = sample(
            logits,
            [Draw(row, s.request.params, s.request.seed, s.index, len(s.output)) for row, s in readers],
        )
        going = []
        for (_, sequence), sampled in zip(readers, drawn, strict=True):
            self._append(sequence, sampled)
            if sequence.finish_reason is None:
                going.append((sequence, sampled.token))
            else:
                self._scheduler.drop(sequence)
        self._scheduler.advance(going)
        touched = {sequence.request: None for _, sequence in readers}
        return [self._report(request) for request in touched]

    def _append(self, sequence: Sequence, sampled: Sampled) -> None:
        params = sequence.request.params
        sequence.output.append(sampled.token)
        if sampled.logprobs is not None:
            sequence.logprobs.append(sampled.logprobs)
        self._detokenizers[sequence].push(sampled.token)
        self._generated += 1
        if sampled.token in params.stop_token_ids:
            sequence.finish_reason, sequence.stop_reason = "stop", sampled.token
        elif sampled.token in self._eos and not params.ignore_eos:
            sequence.finish_reason = "stop"
        elif len(sequence.output) >= self._max_output(sequence.request):
            sequence.finish_reason = "length"

    def _report(self, request: Request) -> RequestOutput:
        finished = request.finished
        output = RequestOutput(
            request_id=request.id,
            prompt_token_ids=request.prompt.tolist(),
            outputs=[self._completion(sequence) for sequence in request.sequences],
            finished=finished,
            num_cached_tokens=request.num_cached_tokens or 0,
        )
        if finished:
            del self._requests[request.id]
            for sequence in request.sequences:
                del self._detokenizers[sequence]
        return output

    def _completion(self, sequence: Sequence) -> CompletionOutput:
        asked = sequence.request.params.logprobs is not None
        own = zip(sequence.logprobs, sequence.output, strict=asked)
        return CompletionOutput(
            index=sequence.index,
            text=self._detokenizers[sequence].text,
            token_ids=list(sequence.output),
            finish_reason=sequence.finish_reason,
            stop_reason=sequence.stop_reason,
            cumulative_logprob=sum(found[token] for found, token in own) if asked else None,
            logprobs=list(sequence.logprobs) if asked else None,
        )

    def _stream(self, request_id: str, cumulative: bool) -> Iterator[RequestOutput]:
        sent: dict[int, tuple[int, int]] = {}
        finished = False
        try:
            while not finished:
                for output in self._step_or_stall():
                    if output.request_id != request_id:
                        self._undelivered.append(output)
                        continue
                    finished = output.finished
                    yield output if cumulative else _delta(output, sent)
        finally:
            self._abandon({request_id} if not finished else set())

    def _step_or_stall(self) -> list[RequestOutput]:
        """A step that must bring something: without one, a caller would wait for ever."""
        rows = self._runner.computed_rows
        outputs = self.step()
        if not outputs and rows == self._runner.computed_rows:
            raise RadixgenError("no request can run: the KV pool is held by locks that no request owns")
        return outputs

    def _abandon(self, request_ids: set[str]) -> None:
        """Cancel requests that nobody waits for any more, and drop their reports."""
        for request_id in request_ids & self._requests.keys():
            self.cancel(request_id)
        self._undelivered = [o for o in self._undelivered if o.request_id not in request_ids]

    def _tokenize(self, prompt: Prompt) -> TokenArray:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InvalidRequest("prompt", prompt, "the model has no tokenizer: give token ids")
            return np.array(self.tokenizer(prompt)["input_ids"], np.int32)
        return _token_ids(prompt, self._model.vocab_size)

    def _check_request(self, prompt: TokenArray, params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise InvalidRequest("params", params, "must be SamplingParams")
        params.validate(self.limits)
        if prompt.size == 0:
            raise InvalidRequest("prompt", [], "must hold at least one token")
        if prompt.size >= self.max_model_len:
            limit = f"the context holds {self.max_model_len} tokens, one of them generated"
            raise PromptTooLong("len(prompt)", prompt.size, limit)
        needed = min(prompt.size + params.max_tokens, self.max_model_len) - 1
        if needed > self._tree.pool.capacity:
            limit = f"needs {needed} of the pool's {self._tree.pool.capacity} slots"
            raise PromptTooLong("len(prompt) + max_tokens", prompt.size + params.max_tokens, limit)

    def _max_output(self, request: Request) -> int:
        return min(request.params.max_tokens, self.max_model_len - request.prompt.size)

    def _new_id(self, asked: str | None) -> str:
        if asked is None:
            return f"request-{self._serial + 1}"
        if asked in self._requests:
            raise DuplicateRequest("request_id", asked, "a live request has this id")
        return asked

    def _ensure_open(self) -> None:
        if self._closed:
            raise EngineClosed("the engine is closed")


def _check_options(plan: str, max_step_tokens: int, kv_tokens: int | None) -> None:
    if plan not in PLAN_MODES:
        raise InvalidRequest("plan", plan, f"must be one of {', '.join(PLAN_MODES)}")
    for field, value in (("max_step_tokens", max_step_tokens), ("kv_tokens", kv_tokens)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InvalidRequest(field, value, "must be an integer of at least 1")


def _loaded(
    model: "str | Path | PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase | None",
    dtype: str | torch.dtype,
    device: str,
) -> LoadedModel:
    if isinstance(model, str | Path):
        return load(model, dtype, device)
    if not isinstance(model, torch.nn.Module):
        raise InvalidRequest("model", model, "must be a name, a path or a transformers model")
    if device != "auto":
        model = model.to(resolve_device(device))
    return LoadedModel(type(model).__name__, model.eval(), tokenizer)


def _eos_tokens(model: "PreTrainedModel") -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    eos = getattr(generation, "eos_token_id", None)
    if eos is None:
        eos = model.config.get_text_config().eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)


def _default_slots(model: TreeModel, limits: Limits) -> int:
    """As many tokens as a share of the free memory holds."""
    bytes_per_token = sum(shape.bytes_per_token for shape in model.layer_shapes)
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0] * _CUDA_SHARE
    else:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") * _CPU_SHARE
    most = limits.max_num_seqs * model.max_model_len
    slots = min(int(free) // bytes_per_token, most)
    if slots < 1:
        raise UnsupportedModel(f"{model.name}: no memory is left for its KV cache")
    return slots


def _token_ids(prompt: Seq[int] | TokenArray, vocab_size: int) -> TokenArray:
    """A prompt as int32 token ids, each checked. Raises `InvalidRequest` that names the first bad place."""
    if isinstance(prompt, np.ndarray) and prompt.ndim == 1 and prompt.dtype.kind in "iu":
        ids = prompt
    elif not isinstance(prompt, Seq):
        raise InvalidRequest("prompt", prompt, "must be text or a flat sequence of token ids")
    else:
        for place, token in enumerate(prompt):
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise InvalidRequest(f"prompt[{place}]", token, "must be an integer token id")
        ids = np.array(prompt, object)
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if bad.size:
        place = int(bad[0])
        raise InvalidRequest(f"prompt[{place}]", int(ids[place]), f"must be from 0 to {vocab_size - 1}")
    return ids.astype(np.int32)


def _as_prompts(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    """A string, token ids, or a list of either."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Seq | np.ndarray):
        raise InvalidRequest("prompts", prompts, "must be text, token ids, or a list of either")
    if len(prompts) and isinstance(prompts[0], int | np.integer):
        return [prompts]  # type: ignore[list-item]
    for prompt in prompts:
        if not isinstance(prompt, str | Seq | np.ndarray):
            raise InvalidRequest("prompts", prompt, "must be text or token ids")
    return list(prompts)


def _as_params(params: SamplingParams | Seq[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest("len(params)", len(params), f"must be {count}, as many as prompts")
    return list(params)


def _mix(seed: int, serial: int) -> int:
    """A 64-bit seed for request `serial`."""
    return hash((seed, serial)) & (2**64 - 1)


def _delta(output: RequestOutput, sent: dict[int, tuple[int, int]]) -> RequestOutput:
    """What `output` adds to what `sent` (tokens and characters by sequence) says was yielded before."""
    fresh = []
    for whole in output.outputs:
        tokens, characters = sent.get(whole.index, (0, 0))
        sent[whole.index] = (len(whole.token_ids), len(whole.text))
        fresh.append(
            CompletionOutput(
                index=whole.index,
                text=whole.text[characters:],
                token_ids=whole.token_ids[tokens:],
                finish_reason=whole.finish_reason,
                stop_reason=whole.stop_reason,
                cumulative_logprob=whole.cumulative_logprob,
                logprobs=whole.logprobs[tokens:] if whole.logprobs is not None else None,
            )
        )
    return RequestOutput(output.request_id, output.prompt_token_ids, fresh, output.finished, output.num_cached_tokens)
