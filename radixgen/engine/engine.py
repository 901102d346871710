"""`Engine`: serves requests to one model, with one radix tree as its KV cache."""

import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar, Unpack

import torch

from radixgen.cache import TokenArray
from radixgen.chat.conversation import Conversation
from radixgen.chat.dialogue import Options
from radixgen.core import (
    BeamSearchParams,
    CacheHint,
    HintResult,
    InvalidRequest,
    Limits,
    OutputKind,
    RequestOutput,
    Stats,
    check_integer,
)
from radixgen.core.adapters import refuses_adapters
from radixgen.core.reading import EXACT, ReadingPolicy, check_reading
from radixgen.core.reuse import Reuse, SegmentReuse, segment_reuse
from radixgen.engine.core import EngineCore
from radixgen.engine.input_processor import InputProcessor, Messages, Params, Prompt, Tools, chat_tokens
from radixgen.engine.output_processor import OutputProcessor
from radixgen.engine.pins import PrefixPins
from radixgen.engine.profiler import StepProfiler
from radixgen.engine.request_loop import OutputStream, Progress, RequestLoop
from radixgen.engine.request_options import PinOptions, RequestOptions, SubmitOptions
from radixgen.engine.submitter import RequestSubmitter
from radixgen.engine.warm_up import run_warm_up, warm_up_steps
from radixgen.model.base import Model
from radixgen.model.prepare import costs_of, dtype_of, prepare_model, runs_on_gpu
from radixgen.scheduler.planner import PlanMode, check_plan_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")


class Engine:
    """Serves one model. Not thread-safe: use it from one thread.

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
        quantization: str | None = None,
        device: str = "auto",
        tensor_parallel_size: int = 1,
        attention: str = "auto",
        kv_dtype: str = "auto",
        plan: PlanMode = "auto",
        share: bool = True,
        reuse: Reuse | SegmentReuse = "prefix",
        kv_tokens: int | None = None,
        host_kv_tokens: int = 0,
        kv_offloading_size: float = 0.0,
        kv_dir: "str | Path | None" = None,
        kv_dir_bytes: int | None = None,
        max_step_tokens: int | None = None,
        max_model_len: int | None = None,
        enforce_eager: bool = False,
        torch_compile: bool | None = None,
        async_scheduling: bool = True,
        warm_up: bool | None = None,
        seed: int = 0,
        reading: ReadingPolicy = EXACT,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
        debug: bool = False,
    ) -> None:
        """
        model: `"smollm2"`, a directory, a `.gguf` file, a hub id, a transformers model (in use until `close`), or any
            object with the methods of `radixgen.model.base.Model`.
        tokenizer: tokenizer for a model object, or an override. Without a tokenizer only token ids are accepted.
        load_format: `"auto"` reads a checkpoint. `"dummy"` uses reproducible random weights and needs only the config;
            for testing speed and memory.
        dtype: `float32`, `bfloat16` or `float16`. `"auto"`: the checkpoint's; on a CPU bfloat16 if the processor
            multiplies it faster than float32, else float32. A model object keeps its own.
        quantization: `"int8"`, `"int4"`, or `"gguf"` (4-bit blocks of the file) on a CPU, `"fp8"` on a GPU: rounds the
            weights of linear layers. Default: as the checkpoint has them.
        tensor_parallel_size: number of processes to shard a model given by name over, including this one; one GPU per
            process if the machine has any.
        attention: `"auto"` or a backend of `radixgen.kernels.backend.BACKENDS`.
        kv_dtype: data type of keys and values in the pool: `"auto"` (the model's), or 8 bits with a scale per token and
            head: `"int8"`, or `"fp8"` on GPUs of compute capability 8.9 or later. 8 bits hold almost twice the tokens,
            and change outputs slightly.
        plan: how steps read shared prefixes. `"auto"` minimizes the predicted time, `"unshared"` reads each row's path
            separately, `"prefix"` shares only the first node of each path, `"naive"` shares every node.
        share: False gives every sequence a separate tree, so that nothing is stored or computed together.
        reuse: `"segments"`, or its settings, also takes cached tokens that are no prefix. Such outputs are inexact.
        kv_tokens: slots of the KV pool. Default: as many as fit in 85 % of the GPU memory left free after the largest
            step, or in 25 % of the free memory on a CPU; fewer if that allocation fails.
        host_kv_tokens: tokens whose KV host memory keeps as well, to be fetched after the pool has evicted it; or
            `kv_offloading_size`, in GiB.
        kv_dir: folder that keeps KV on disk, also for later engines with the same weights, through a host tier of at
            most 4 GiB by default. It is open to its owner alone, and to one engine at a time.
        kv_dir_bytes: maximum size of the files in `kv_dir`. Default: 16 GiB.
        max_step_tokens: maximum rows per step; longer prompts are computed in chunks. Default: 2,048, or 8,192 on a GPU
            with 32 GiB or more.
        max_model_len: maximum length of prompt plus output, in tokens. Default: the model's maximum.
        enforce_eager: no CUDA graphs, and by default no `torch.compile`.
        torch_compile: fuse the model's blocks with `torch.compile`. Default: on GPUs. Results are kept in the cache
            directory; without them, the first steps take about a minute. If it fails, a warning is logged.
        async_scheduling: let the device begin a captured step while the host still reads the tokens of the last one.
            The tokens are the same either way.
        warm_up: call `Engine.warm_up` before the constructor returns. Default: on GPUs.
        reading: policy of `radixgen.reading` by which requests read their keys, unless they bring their own.
        seed: base seed. A request without a seed derives one from this and its submission number.
        clock: monotonic time in seconds, for deadlines and the lifetime of pins.
        debug: stamp every slot with a hash of its prefix, for `check()`, and check that no plan uses a free slot.

        Raises `ModelNotFound`, `UnsupportedModel`, `InvalidRequest`, and `EngineDead` if a process cannot be started.
        """
        self.limits = limits or Limits()
        check_plan_mode("plan", plan)
        check_integer("seed", seed, 0, 2**64 - 1)
        segments = segment_reuse(reuse, share)
        check_reading("reading", reading)
        prepared = prepare_model(
            model,
            tokenizer,
            self.limits,
            load_format=load_format,
            dtype=dtype,
            quantization=quantization,
            device=device,
            attention=attention,
            kv_dtype=kv_dtype,
            kv_tokens=kv_tokens,
            host_kv_tokens=host_kv_tokens,
            kv_offloading_size=kv_offloading_size,
            kv_dir=kv_dir,
            kv_dir_bytes=kv_dir_bytes,
            max_model_len=max_model_len,
            max_step_tokens=max_step_tokens,
            ranks=tensor_parallel_size,
            graphs=not enforce_eager,
            torch_compile=torch_compile,
            moves_kv=segments is not None,
            reading=reading,
        )
        self._model = served = prepared.model
        self.tokenizer = prepared.tokenizer
        self.model_name = served.name
        self.max_model_len = served.max_model_len
        self.max_step_tokens = prepared.max_step_tokens
        self.eos_token_ids = served.eos_token_ids
        """The model's own end tokens. For those of chats, see `inputs.chat_eos_token_ids`."""
        self.dtype = dtype_of(served)
        """Data type of the weights, or of the logits if the model is not transformers'."""
        self.inputs = InputProcessor(
            self.tokenizer,
            vocab_size=served.vocab_size,
            max_model_len=served.max_model_len,
            kv_tokens=prepared.kv_tokens,
            limits=self.limits,
            eos_token_ids=served.eos_token_ids,
        )
        """Tokenizes and checks requests. May be used from another thread."""
        self._core = EngineCore(
            served,
            kv_tokens=prepared.kv_tokens,
            host_kv=prepared.host_kv,
            disk=prepared.disk,
            kv_mover=prepared.kv_mover,
            reuse=segments,
            max_step_tokens=prepared.max_step_tokens,
            limits=self.limits,
            plan=plan,
            costs=costs_of(served),
            async_scheduling=async_scheduling,
            seed=seed,
            debug=debug,
            drawable=self.inputs.drawable,
            reading=reading,
        )
        self._guard = self._core.guard
        self._loop = RequestLoop(self._core, OutputProcessor(self.inputs.vocabulary), clock)
        self._submitter = RequestSubmitter(self.inputs, self._core, self._loop, clock, share=share)
        self._pins = PrefixPins(self.inputs, self._core, self._loop, self._submitter, clock)
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
        """Serve one prompt (text or token ids) or many at once. Returns the outputs in the order of the prompts.

        `progress(done, total)` is called after every step with the number of finished requests. All prompts are
        checked before any is queued. If the waiting queue is full, the rest is queued as it empties. Raises
        `InvalidRequest`.
        """
        return self._submitter.generate(prompts, params, progress)

    @refuses_adapters
    def beam_search(
        self, prompts: Prompt | Seq[Prompt], params: BeamSearchParams, *, progress: Progress | None = None
    ) -> list[RequestOutput]:
        """Search for the likeliest continuations of one prompt, or of many at once.

        Returns an output per prompt, in order; its `outputs` are the hypotheses, best first. Each beam is a cursor in
        the tree. Extending or branching a beam copies no KV, and each step computes one row per beam. `submit`,
        `stream` and `generate` accept `BeamSearchParams` too. A beam search returns only its final output. Raises
        `InvalidRequest`.
        """
        self._loop.begin_call()
        if not isinstance(params, BeamSearchParams):
            raise InvalidRequest("params", params, "must be BeamSearchParams")
        return self.generate(prompts, params, progress=progress)

    @refuses_adapters
    def chat(self, messages: Messages | Seq[Messages], params: Params | None = None) -> list[RequestOutput]:
        """Serve one conversation, or many at once, through the model's chat template.

        A message is `{"role": …, "content": …}`; content is text, None, or a list of parts
        `{"type": "text", "text": …}`. An answer also ends at the tokenizer's end token and at the token that ends a
        turn in the template. Raises `InvalidRequest`.
        """
        return self._submitter.chat(messages, params)

    def conversation(self, system: str | None = None, **options: Unpack[Options]) -> Conversation:
        """Start a conversation with the system message `system`. Each turn computes only its new tokens.

        Takes the options of `radixgen.chat.dialogue.Dialogue`. `Conversation.load` restores a saved conversation.
        Raises `InvalidRequest`.
        """
        self._loop.begin_call()
        return Conversation(self, system, **options)

    def chat_tokens(self, messages: Messages, tools: Tools = None) -> list[int]:
        """Return the conversation as token ids, up to where the model's answer begins.

        `tools` are JSON schemas of functions, for the chat template. With `engine.inputs.for_chat(params)`, the answer
        ends as in `chat`. Raises `InvalidRequest`.
        """
        return chat_tokens(self.tokenizer, messages, tools)

    def tokenize(self, prompt: Prompt, *, special: bool = True) -> TokenArray:
        """Return `prompt` as checked token ids, int32. With `special`, text gets the tokenizer's special tokens. May be
        called from another thread. Raises `InvalidRequest`.
        """
        return self.inputs.tokenize(prompt, special=special)

    def compile_grammar(self, params: Params) -> None:
        """Check `params` and compile their grammar, if they have one, so that no step waits for it. May be called from
        another thread. Raises `InvalidRequest`.
        """
        self.inputs.check_params(params)

    @refuses_adapters
    def score(
        self, prompt: Prompt, continuations: Seq[Prompt], *, namespace: str = "", reuse: Reuse | None = None
    ) -> list[list[float]]:
        """Return the natural-log probabilities of each continuation's tokens after `prompt`, under the model's own
        distribution.

        All continuations are scored at once; what they share, such as the prompt, is computed once. A text
        continuation is tokenized separately, without special tokens; pass token ids if that matters. Raises
        `InvalidRequest`, and `RequestFailed` if a continuation could not be scored.
        """
        return self._submitter.score(prompt, continuations, namespace, reuse)

    def decode(self, token_ids: Seq[int]) -> str:
        """Return the text of `token_ids`, including special tokens, or the ids as text if there is no tokenizer."""
        return self.inputs.decode(token_ids)

    @refuses_adapters
    def stream(
        self,
        prompt: Prompt,
        params: Params | None = None,
        *,
        cumulative: bool = False,
        **options: Unpack[RequestOptions],
    ) -> OutputStream:
        """Serve one prompt and yield what each step adds, or with `cumulative` everything so far.

        Other requests continue meanwhile. `close` cancels the request at once; if the iterator is dropped, the next
        call of the engine cancels it. Takes the options of `submit` and raises its errors.
        """
        kind: OutputKind = "cumulative" if cumulative else "delta"
        request_id = self.submit(prompt, params, output_kind=kind, **options)
        return OutputStream(self._loop, request_id)

    # -- request by request -------------------------------------------------------------------------------

    @refuses_adapters
    def submit(self, prompt: Prompt, params: Params | None = None, **options: Unpack[SubmitOptions]) -> str:
        """Queue a request and return its id.

        request_id: its id; by default a new one.
        priority: requests with a higher priority are admitted first.
        namespace: requests of different namespaces share nothing.
        timeout: seconds from now. A request that is still open then ends with `abort` and the stop reason `"deadline"`,
            and keeps what it has generated.
        output_kind: `"cumulative"` outputs hold everything so far, `"delta"` outputs what is new, and `"final"` gives
            only the last output. A beam search always gives only the last.
        cache_hints: what to do with the KV of the prompt afterwards. The last output has an answer to each.
        hint_owner: whose limits the pins of hints count towards. Default: the namespace.
        reuse: `"prefix"` for exact outputs, or `"segments"`. Default: as the engine.

        Raises `InvalidRequest` or a subclass, or `QueueFull`; then nothing is queued.
        """
        return self._submitter.submit(prompt, params, **options)

    def apply_hints(
        self, prompt: Prompt, hints: Seq[CacheHint], *, namespace: str = "", hint_owner: str | None = None
    ) -> tuple[HintResult, ...]:
        """Apply cache hints to what is cached of `prompt` now. Returns an answer to each. Raises `InvalidRequest`."""
        return self._submitter.apply_hints(prompt, hints, namespace, hint_owner)

    @refuses_adapters
    def submit_score(
        self, prompt: Prompt, continuation: Prompt, *, request_id: str | None = None, namespace: str = ""
    ) -> str:
        """Queue one continuation for scoring, and return the request's id. `scores_of` reads its only output.

        Raises `InvalidRequest` or a subclass, or `QueueFull`; then nothing is queued.
        """
        return self._submitter.submit_score(prompt, continuation, request_id=request_id, namespace=namespace)

    def step(self) -> list[RequestOutput]:
        """Run one step. Returns an output for every request that got tokens or ended.

        If the model raises an exception, the step is undone and its requests are tried again, each alone. A request
        that fails again ends with `error`. After any other exception or interrupt in a step, the engine is dead: all
        later calls except `close` raise `EngineDead`. An interrupt while the model runs or a fetch is waited for only
        undoes the step.
        """
        return self._loop.step()

    def cancel(self, request_id: str) -> None:
        """End a request with `finish_reason="abort"`; the next step reports it. Raises `UnknownRequest`."""
        self._loop.begin_call()
        self._loop.cancel(self._loop.live(request_id))

    def fork(self, request_id: str, n: int = 1) -> list[str]:
        """Create `n` requests that continue from this one's current token with other draws, and return their ids.

        No KV is copied or computed. The first output of a fork has all that the request has generated before. Greedy
        forks generate the same as the request. Raises `UnknownRequest`, `InvalidRequest` (also for a beam search) and
        `QueueFull`.
        """
        return self._submitter.fork(request_id, n)

    def pin(self, prompt: Prompt, *, replaces: int | None = None, **options: Unpack[PinOptions]) -> int | None:
        """Keep the cached prefix of `prompt` even if unused. Returns the pin's id, or None if nothing is cached.

        A pin lasts until `unpin`, for `ttl` seconds, or until memory is needed and nothing else can be freed. Pins with
        the lowest priority are released first. The pin `replaces` is released in the same call. `reading`: the policy
        of the requests that are to find it, by default the engine's. Raises `InvalidRequest`, `LimitReached`.
        """
        return self._pins.pin(prompt, replaces, **options)

    def unpin(self, pin: int) -> bool:
        """Release a pin. Returns False if it is already gone."""
        return self._pins.unpin(pin)

    @property
    def pins(self) -> frozenset[int]:
        """Ids of the current pins."""
        return self._pins.ids

    @refuses_adapters
    def preload(self, prompts: Prompt | Seq[Prompt], **options: Unpack[PinOptions]) -> list[int | None]:
        """Compute prompts that later requests begin with, such as system prompts or documents, and pin them.

        Returns the pins in the order of the prompts; a pin is None if memory was too short to keep any of the prompt.
        Only the prompts' KV stays. Raises `InvalidRequest`, and `LimitReached` if there would be too many pins; then
        nothing is pinned.
        """
        return self._pins.preload(prompts, **options)

    @property
    def runs_on_gpu(self) -> bool:
        """Whether the model runs on GPUs. There the first step of each kind is slow."""
        return runs_on_gpu(self._model)

    def warm_up(self, progress: Progress | None = None) -> None:
        """Run every kind of step once, so that no request waits for compilation or graph capture: all sizes of CUDA
        graphs, the largest step and small ones, and each way of drawing tokens.

        Tree, KV, statistics and seeds stay as they were. `progress(done, total)` is called after each step. A step that
        fails, for example for lack of memory, is logged as a warning; if the model is sharded over several processes,
        it raises `EngineDead`. Does nothing for models that are not transformers'.
        """
        run_warm_up(self.warm_up_steps(), progress)

    def warm_up_steps(self) -> list[Callable[[], None]]:
        """Return the calls that `warm_up` makes in this order. The engine may be used between them."""
        self._loop.begin_call()
        steps = warm_up_steps(self._model, self.inputs.drawable, self.max_step_tokens, self.limits.max_num_seqs)
        return [partial(self._loop.run_apart, step) for step in steps]

    def profile(self, directory: str | Path, num_steps: int = 10) -> StepProfiler:
        """Write a torch profiler trace of `num_steps` steps to `directory`, in Chrome's JSON format.

        Recording begins after the next step that has work. If the profiler (a context manager) or the engine is closed
        earlier, the trace has the steps until then. The profiler's `path` is set when the trace is written. Of a model
        that is sharded over processes, only this process is recorded. Raises `InvalidRequest`.
        """
        self._loop.begin_call()
        return self._loop.profile(StepProfiler(directory, num_steps))

    # -- what it reports ----------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Number of steps that ran or failed."""
        return self._core.num_attempts

    @property
    def num_unfinished_requests(self) -> int:
        """Number of requests without their last output."""
        return len(self._core.requests)

    @property
    def has_unfinished(self) -> bool:
        """True if `step` has work or output left. Also true if the engine is dead, so that `step` raises."""
        return self._loop.has_unfinished

    @property
    def fetching(self) -> bool:
        """Whether KV is on its way from host memory or disk. `step` goes on with it, and waits only for requests."""
        return not self._loop.closed and self._core.fetching

    def inspect(self, function: Callable[[EngineCore], T]) -> T:
        """Call `function` with the live core (tree, scheduler, planner, counters) and return its result. It may read
        everything and may add listeners to the tree and to draws, but must change nothing else.
        """
        return function(self._core)

    def knows(self, request_id: str) -> bool:
        """Whether there is a request with this id whose last output was not made yet."""
        return request_id in self._core.requests

    def explain_plan(self) -> str:
        """Describe the last step's plan, in bytes of KV over all layers. For why a prompt was not shared, see
        `sharing_ended` of its output.
        """
        last = self._core.planner.last
        return last.explain(self._model.kv_bytes_per_token) if last else "no step has run"

    def stats(self) -> Stats:
        self._guard.require()
        return self._core.stats()

    # -- the engine itself --------------------------------------------------------------------------------

    def check(self) -> None:
        """Assert every invariant: slots have one owner, locks belong to cursors and pins, counts add up."""
        self._guard.require()
        self._core.check()
        self._loop.check()

    def reset_prefix_cache(self) -> int:
        """Evict everything that no live request and no pin locks. Returns the number of tokens."""
        self._loop.begin_call()
        with self._guard:
            return self._core.reset_prefix_cache()

    def close(self) -> None:
        """Release the model and the KV pool. Live requests end without an output. May be called twice."""
        if not self._loop.closed:
            try:
                self._loop.close()
            finally:
                self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
