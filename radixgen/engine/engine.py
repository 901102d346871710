"""`Engine`: requests in, text and tokens out, one radix tree in between."""

import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack

import numpy as np
import torch

from radixgen.cache import TokenArray
from radixgen.chat.conversation import Conversation
from radixgen.chat.dialogue import Options
from radixgen.core import (
    BeamSearchParams,
    DuplicateRequest,
    InvalidRequest,
    Limits,
    OutputKind,
    RequestOutput,
    SamplingParams,
    Stats,
    check_integer,
)
from radixgen.core.adapters import refuses_adapters
from radixgen.engine.core import EngineCore
from radixgen.engine.input_processor import (
    InputProcessor,
    Messages,
    Params,
    Prompt,
    Tools,
    as_params,
    as_prompts,
    chat_tokens,
)
from radixgen.engine.output_processor import OutputProcessor, scores_of
from radixgen.engine.request_loop import OutputStream, Progress, RequestLoop
from radixgen.engine.request_options import CoreOptions, PinOptions, RequestOptions
from radixgen.engine.warm_up import run_warm_up, warm_up_steps
from radixgen.model.base import Model
from radixgen.model.prepare import (
    allocate_kv,
    check_options,
    costs_of,
    default_step_tokens,
    dtype_of,
    prepare_model,
    runs_on_gpu,
)
from radixgen.scheduler.planner import PlanMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")

_OUTPUT_KINDS = ("cumulative", "delta", "final")
_SCORING = SamplingParams(max_tokens=1, prompt_logprobs=0)
PRELOADING = SamplingParams(temperature=0.0, max_tokens=1)
"""The token is drawn and forgotten: it never enters the tree."""


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
        model: "str | Path | PreTrainedModel | Model",
        *,
        tokenizer: "PreTrainedTokenizerBase | None" = None,
        load_format: str = "auto",
        dtype: str | torch.dtype = "auto",
        device: str = "auto",
        tensor_parallel_size: int = 1,
        attention: str = "auto",
        plan: PlanMode = "auto",
        share: bool = True,
        kv_tokens: int | None = None,
        max_step_tokens: int | None = None,
        max_model_len: int | None = None,
        enforce_eager: bool = False,
        torch_compile: bool | None = None,
        async_scheduling: bool = True,
        warm_up: bool | None = None,
        seed: int = 0,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        debug: bool = False,
    ) -> None:
        """
        model: `"smollm2"`, a directory, a `.gguf` file, a hub id, a transformers model (borrowed until `close`), or
        anything that has the methods of `radixgen.model.base.Model`.
        tokenizer: of a model given as an object, or in place of the one that a name brings; a model without one serves
            token ids.
        load_format: `"auto"` reads a checkpoint; `"dummy"` makes random weights, the same each time, of a model given
            by name, of which only the config has to be there: to try speed and memory.
        dtype: `"auto"` keeps the checkpoint's; else `float32`, `bfloat16` or `float16`.
        tensor_parallel_size: processes that a model given by name is sharded over, this one and those that it starts,
            with a GPU each where the machine has any.
        attention: `"auto"` or a backend of `radixgen.kernels.BACKENDS`.
        plan: `"auto"`; `"unshared"` reads the same tree one path a row.
        share: False gives every sequence a tree of its own, so that nothing is stored or computed in common.
        kv_tokens: slots of the KV pool; by default what 85 % of the memory holds that a GPU has free when the largest
            step has run, or 25 % of the machine's, and fewer where that can't be had.
        max_step_tokens: rows of one step at the most; longer prompts are computed in chunks. By default 2,048, and
            8,192 on a GPU with 32 GiB or more.
        max_model_len: longest prompt plus output, in tokens; by default the model's own maximum.
        enforce_eager: never replay decoding steps from CUDA graphs, nor compile by default.
        torch_compile: let PyTorch fuse the model's blocks; what it makes is kept in the cache directory, and the very
            first steps take a minute. By default on GPUs. Where it fails, there is a warning, and the model runs as
            it is.
        async_scheduling: let the device begin a step while the host still reads the tokens of the one before, where
            steps are captured. The tokens are the same.
        warm_up: run every kind of step once, as `Engine.warm_up` does, before the constructor returns. By default on
            GPUs.
        seed: where a request has no seed of its own, this and its place in the order of submission give one.
        clock: seconds, never going back; deadlines and pins are held against it.
        debug: stamp every slot with a hash of its prefix, so that `check()` proves what each reader finds there,
            and check before every step that its plan names no free slot.

        Raises `ModelNotFound`, `UnsupportedModel`, `InvalidRequest`; `EngineDead` where a process can't be started.
        """
        self.limits = limits or Limits()
        sizes = {"max_step_tokens": max_step_tokens, "kv_tokens": kv_tokens, "max_model_len": max_model_len}
        check_options(model, plan, seed, load_format, dtype, device, attention, sizes)
        max_step_tokens = max_step_tokens or default_step_tokens(model, device)
        served, self.tokenizer = prepare_model(
            model,
            tokenizer,
            self.limits,
            load_format=load_format,
            dtype=dtype,
            device=device,
            attention=attention,
            max_model_len=max_model_len,
            max_step_tokens=max_step_tokens,
            ranks=tensor_parallel_size,
            graphs=not enforce_eager,
            torch_compile=torch_compile,
        )
        slots = allocate_kv(served, kv_tokens, self.limits, max_step_tokens)
        self.share = share
        self.max_model_len = served.max_model_len
        self._model = served
        self._clock = clock
        self._inputs = InputProcessor(
            self.tokenizer,
            vocab_size=served.vocab_size,
            max_model_len=served.max_model_len,
            kv_tokens=slots,
            limits=self.limits,
            eos_token_ids=served.eos_token_ids,
        )
        self._core = EngineCore(
            served,
            kv_tokens=slots,
            max_step_tokens=max_step_tokens,
            limits=self.limits,
            plan=plan,
            costs=costs_of(served),
            async_scheduling=async_scheduling,
            seed=seed,
            debug=debug,
            drawable=self._inputs.drawable,
        )
        self._guard = self._core.guard
        self._loop = RequestLoop(self._core, OutputProcessor(self._inputs.vocabulary), clock)
        if self.runs_on_gpu if warm_up is None else warm_up:
            self.warm_up()

    # -- whole requests -----------------------------------------------------------------------------------

    @refuses_adapters
    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        params: Params | Seq[Params] | None = None,
        *,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """Serve one prompt (a string or token ids) or many as one burst; outputs in the order of the prompts.

        `progress(done, total)` is called after every step with the number of finished requests. All prompts
        are checked before any is admitted; what the waiting queue cannot take at once follows as it empties.
        Raises `InvalidRequest`.
        """
        self._loop.begin_call()
        batch = as_prompts(prompts)
        each = as_params(params, len(batch))
        tokens = [self._inputs.tokenize(prompt) for prompt in batch]
        for ids, own in zip(tokens, each, strict=True):
            self._inputs.check(ids, own)
        submits = [partial(self._submit, ids, own) for ids, own in zip(tokens, each, strict=True)]
        return self._loop.serve(submits, progress)

    @refuses_adapters
    def beam_search(
        self, prompts: Prompt | Seq[Prompt], params: BeamSearchParams, *, progress: Progress | None = None
    ) -> list[RequestOutput]:
        """Search the likeliest continuations of one prompt, or of many as one burst; outputs in the order of the
        prompts, each with its hypotheses, best first, as `outputs`.

        Beams are cursors: one that goes on moves nothing, one that goes on in several ways copies no KV, and a step
        computes one row a beam. `submit`, `stream` and `generate` take `BeamSearchParams` too; of a search there
        is only the last output. Raises `InvalidRequest`.
        """
        self._loop.begin_call()
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequest("params", params, "must be BeamSearchParams")
        return self.generate(prompts, params, progress=progress)

    @refuses_adapters
    def chat(self, messages: Messages | Seq[Messages], params: Params | None = None) -> list[RequestOutput]:
        """Serve one conversation, or many as one burst, through the model's chat template.

        A message is `{"role": …, "content": …}`; content is text, None, or a list of parts
        `{"type": "text", "text": …}`. An answer also ends at the tokenizer's end token and at the one by which the
        template ends a turn. Raises `InvalidRequest`.
        """
        self._loop.begin_call()
        many = isinstance(messages, Seq) and bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if many else [messages]
        each = [self._inputs.for_chat(own) for own in as_params(params, len(conversations))]
        return self.generate([self.chat_tokens(conversation) for conversation in conversations], each)

    def conversation(self, system: str | None = None, **options: Unpack[Options]) -> Conversation:
        """A conversation that begins with `system`: each turn computes its new tokens alone. The options are those of
        `radixgen.chat.dialogue.Dialogue`; `Conversation.load` brings a saved one back. Raises `InvalidRequest`.
        """
        self._loop.begin_call()
        return Conversation(self, system, **options)

    def chat_tokens(self, messages: Messages, tools: Tools = None) -> list[int]:
        """The conversation as token ids, ending where the model's answer begins; `tools`, JSON schemas of functions, go
        to the chat template. `engine.inputs.for_chat(params)` ends the answer as `chat` does. Raises `InvalidRequest`.
        """
        return chat_tokens(self.tokenizer, messages, tools)

    def tokenize(self, prompt: Prompt, *, special: bool = True) -> TokenArray:
        """`prompt` as checked token ids, int32; text with the tokenizer's special tokens where `special`. May be called
        from another thread. Raises `InvalidRequest`.
        """
        return self._inputs.tokenize(prompt, special=special)

    def compile_grammar(self, params: Params) -> None:
        """Check `params` and compile their grammar, if they have one, so that no step waits for it. May be called from
        another thread. Raises `InvalidRequest`.
        """
        self._inputs.check_params(params)

    @refuses_adapters
    def score(self, prompt: Prompt, continuations: Seq[Prompt], *, namespace: str = "") -> list[list[float]]:
        """Natural-log probabilities of each continuation's tokens after `prompt`, under the model's own
        distribution.

        One burst: what continuations have in common, the prompt first of all, is computed once. A text
        continuation is tokenized by itself, without special tokens; give token ids where that matters. Raises
        `InvalidRequest`, and `RequestFailed` where a continuation could not be scored.
        """
        self._loop.begin_call()
        tokens = self._inputs.tokenize(prompt)
        each = [self._inputs.tokenize_continuation(text) for text in as_prompts(continuations, "continuations")]
        for rest in each:
            self._inputs.check_score(tokens, rest)
        submits = [partial(self.submit_score, tokens, rest, namespace=namespace) for rest in each]
        return [scores_of(output) for output in self._loop.serve(submits)]

    def decode(self, token_ids: Seq[int]) -> str:
        """Text of `token_ids`, special tokens included; the ids themselves where there is no tokenizer."""
        return self._inputs.decode(token_ids)

    @refuses_adapters
    def stream(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        cumulative: bool = False,
        **options: Unpack[RequestOptions],
    ) -> OutputStream:
        """Serve one prompt and yield what each step adds (or, `cumulative`, everything so far).

        Other requests go on meanwhile. `close` cancels the request at once; one whose iterator is dropped is cancelled
        when the engine is called next. The options, and the errors, are those of `submit`.
        """
        kind: OutputKind = "cumulative" if cumulative else "delta"
        request_id = self.submit(prompt, params, output_kind=kind, **options)
        return OutputStream(self._loop, request_id)

    # -- request by request -------------------------------------------------------------------------------

    @refuses_adapters
    def submit(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        namespace: str = "",
        timeout: float | None = None,
        output_kind: OutputKind = "cumulative",
    ) -> str:
        """Queue a request and return its id.

        priority: higher goes first.
        namespace: requests of different namespaces share nothing.
        timeout: seconds from now; a request that has not ended by then ends with `abort` and the stop reason
            `"deadline"`, and keeps what it has generated.
        output_kind: whether outputs hold everything so far or what is new, or whether there is only the last; of a beam
            search there is only the last.

        Raises `InvalidRequest` or a child of it, or `QueueFull`; then nothing is queued.
        """
        self._loop.begin_call()
        params = params if params is not None else SamplingParams()
        tokens = self._inputs.tokenize(prompt)
        self._inputs.check(tokens, params)
        self._inputs.check_name("namespace", namespace)
        check_integer("priority", priority, -(2**31), 2**31 - 1)
        self._check_id(request_id)
        if output_kind not in _OUTPUT_KINDS:
            raise InvalidRequest("output_kind", output_kind, f"must be one of {', '.join(_OUTPUT_KINDS)}")
        deadline = self._clock() + self._inputs.check_seconds("timeout", timeout)
        return self._submit(
            tokens,
            params,
            output_kind,
            request_id=request_id,
            priority=priority,
            namespace=namespace,
            deadline=deadline,
        )

    @refuses_adapters
    def submit_score(
        self, prompt: Prompt, continuation: Prompt, *, request_id: str | None = None, namespace: str = ""
    ) -> str:
        """Queue one continuation to be scored, and return the request's id; `scores_of` reads its only output.

        Raises `InvalidRequest` or a child of it, or `QueueFull`; then nothing is queued.
        """
        self._loop.begin_call()
        tokens, rest = self._inputs.tokenize(prompt), self._inputs.tokenize_continuation(continuation)
        self._inputs.check_score(tokens, rest)
        self._inputs.check_name("namespace", namespace)
        self._check_id(request_id)
        return self._submit(
            np.concatenate([tokens, rest]),
            _SCORING,
            request_id=request_id,
            namespace=namespace,
            score_from=tokens.size - 1,
        )

    def step(self) -> list[RequestOutput]:
        """Run one step. Returns an output for every request that gained tokens or ended.

        Where the model raises, the step is undone and its requests are tried again, each alone; one for which it
        raises again ends with `error`. Whatever else a step raises, an interrupt too, is the end of the engine: all
        later calls but `close` raise `EngineDead`. An interrupt while the model runs leaves the step undone.
        """
        return self._loop.step()

    def cancel(self, request_id: str) -> None:
        """End a request with `finish_reason="abort"`; the next step reports it. Raises `UnknownRequest`."""
        self._loop.begin_call()
        self._loop.cancel(self._loop.live(request_id))

    def fork(self, request_id: str, n: int = 1) -> list[str]:
        """`n` more requests that go on from where this one stands, each with draws of its own; their ids.

        No KV is copied and nothing is computed. Their first output has what the request had generated before;
        greedy ones generate what it does. Raises `UnknownRequest`, `InvalidRequest` (for a beam search too),
        `QueueFull`.
        """
        self._loop.begin_call()
        request = self._loop.live(request_id)
        if request.search is not None:
            raise InvalidRequest("request_id", request_id, "a beam search is not forked")
        check_integer("n", n, 1, self.limits.max_n)
        self._core.require_room(n, n * request.prompt.size)
        return self._loop.fork(request, n)

    def pin(
        self,
        prompt: Prompt,
        *,
        namespace: str = "",
        priority: int = 0,
        ttl: float | None = None,
        replaces: int | None = None,
    ) -> int | None:
        """Keep what is cached of `prompt` although no request may hold it; None where nothing of it is cached.

        A pin lasts until `unpin`, for `ttl` seconds, or until a request needs its memory and nothing else can give
        way: the lowest priority first. The pin that it `replaces` is released at the same moment. Raises
        `InvalidRequest`, `LimitReached`.
        """
        self._loop.begin_call()
        tokens = self._inputs.tokenize(prompt)
        expires = self._check_pin(namespace, priority, ttl)
        with self._guard:
            if isinstance(replaces, int):
                self._core.unpin(replaces)
            pin = self._core.pin(tokens, namespace, priority, expires)
            return pin.id if pin else None

    def unpin(self, pin: int) -> bool:
        """Release a pin. False where it is gone already."""
        self._loop.begin_call()
        with self._guard:
            return isinstance(pin, int) and self._core.unpin(pin)

    @property
    def pins(self) -> frozenset[int]:
        """The pins that hold."""
        return self._core.pins

    @refuses_adapters
    def preload(
        self,
        prompts: Prompt | Seq[Prompt],
        **options: Unpack[PinOptions],
    ) -> list[int | None]:
        """Compute prompts (system prompts, documents) that requests will begin with, as one burst, and pin them; the
        pins in the order of the prompts, None where memory was too short for any of it.

        Nothing stays but the prompts' own KV. Raises `InvalidRequest`, and `LimitReached` where there may not be so
        many pins; then nothing is pinned.
        """
        self._loop.begin_call()
        tokens = [self._inputs.tokenize(prompt) for prompt in as_prompts(prompts)]
        for ids in tokens:
            self._inputs.check(ids, PRELOADING)
        self._check_pin(**options)
        self._core.require_pins(len(tokens))
        place = CoreOptions(namespace=options.get("namespace", ""), priority=options.get("priority", 0))
        self._loop.serve([partial(self._submit, ids, PRELOADING, **place) for ids in tokens])
        return [self.pin(ids, **options) for ids in tokens]

    @property
    def runs_on_gpu(self) -> bool:
        """Whether its model runs on GPUs, where the first step of each kind is slow."""
        return runs_on_gpu(self._model)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Run every kind of step once: all sizes of CUDA graphs, the largest step and small ones, and each way of
        drawing tokens, so that no request waits for something to be compiled or captured.

        Nothing of it stays: tree, KV, statistics and seeds are as before. `progress(done, total)` is called after each.
        A kind that fails, for want of memory perhaps, is logged as a warning; where the model is sharded over several
        processes, that raises `EngineDead`. Does nothing for a model that is not transformers'.
        """
        run_warm_up(self.warm_up_steps(), progress)

    def warm_up_steps(self) -> list[Callable[[], None]]:
        """What `warm_up` calls, one after the other. Other calls may come between them."""
        self._loop.begin_call()
        steps = warm_up_steps(self._model, self._inputs.drawable, self.max_step_tokens, self.limits.max_num_seqs)
        return [partial(self._loop.run_apart, step) for step in steps]

    @property
    def num_steps(self) -> int:
        """Steps that ran or failed."""
        return self._core.num_attempts

    @property
    def num_unfinished_requests(self) -> int:
        """Requests whose last output was not made yet."""
        return len(self._core.requests)

    @property
    def has_unfinished(self) -> bool:
        """Whether a step would run something or report something, be it that the engine is dead."""
        return self._loop.has_unfinished

    # -- the engine itself --------------------------------------------------------------------------------

    def inspect(self, function: Callable[[EngineCore], T]) -> T:
        """The result of `function`, given the live core: its tree, scheduler, planner and counters. It may read
        everything, may listen to the tree, and changes nothing else.
        """
        return function(self._core)

    @property
    def inputs(self) -> InputProcessor:
        """What tokenizes and checks requests. May be used from another thread."""
        return self._inputs

    @property
    def model_name(self) -> str:
        return self._model.name

    @property
    def dtype(self) -> str:
        """Of the weights; of the logits where the model is not transformers'."""
        return dtype_of(self._model)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The model's own end tokens; `inputs.chat_eos_token_ids` has those of chats."""
        return self._model.eos_token_ids

    @property
    def max_step_tokens(self) -> int:
        return self._core.scheduler.max_step_tokens

    def knows(self, request_id: str) -> bool:
        """Whether there is a request of this id whose last output was not made yet."""
        return request_id in self._core.requests

    def explain(self) -> str:
        """The last step's plan, in bytes of KV over all layers. An output's `sharing_ended` says why its prompt was not
        shared.
        """
        last = self._core.planner.last
        return last.explain(self._model.kv_bytes_per_token) if last else "no step has run"

    def stats(self) -> Stats:
        self._guard.require()
        return self._core.stats()

    def check(self) -> None:
        """Assert every invariant: slots have one owner, references are those of the live cursors and pins, counts
        add up, bounds hold.
        """
        self._guard.require()
        self._core.check()
        self._loop.check()

    def reset_prefix_cache(self) -> int:
        """Drop everything cached that no live request and no pin holds. Returns the tokens dropped."""
        self._loop.begin_call()
        with self._guard:
            return self._core.tree.reset()

    def close(self) -> None:
        """Release the model and the KV pool; live requests end without a report. May be called twice."""
        if not self._loop.closed:
            try:
                self._loop.close()
            finally:
                self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------------------

    def _submit(self, tokens: TokenArray, params: Params, kind: OutputKind = "final", **options: Any) -> str:
        """Queue a request that was checked; `options` are those of `EngineCore.make`."""
        grammar = self._inputs.grammar(params)
        request = self._core.make(tokens, params, share=self.share, grammar=grammar, arrived=self._clock(), **options)
        return self._loop.submit(request, kind)

    def _check_pin(self, namespace: str = "", priority: int = 0, ttl: float | None = None) -> float:
        """When a pin of these expires. Releases those that have expired."""
        self._inputs.check_name("namespace", namespace)
        check_integer("priority", priority, -(2**31), 2**31 - 1)
        lifetime, now = self._inputs.check_seconds("ttl", ttl), self._clock()
        with self._guard:
            self._core.scheduler.pins.expire(now)
        return now + lifetime

    def _check_id(self, request_id: str | None) -> None:
        if request_id is None:
            return
        self._inputs.check_name("request_id", request_id)
        if request_id in self._core.requests:
            raise DuplicateRequest("request_id", request_id, "a request with this id has not ended")
