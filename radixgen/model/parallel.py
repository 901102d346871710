"""Tensor parallelism: one model sharded over several processes that run the same steps.

transformers shards the weights by the plan in the model's config. Each rank has its share of the heads, and a KV pool
with the same slots for those heads. Tree, scheduler and sampling run on rank 0: `ParallelModel` sends each call to the
other ranks and takes part in it. Within a step the ranks communicate by torch.distributed. Each computes its columns of
the logits, from which they draw together (`radixgen.model.sharded_logits`). Other decisions, such as capturing a graph
or running ahead, follow from state that all ranks share, or are agreed on.
"""

import logging
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from radixgen.cache.storage import kv_room
from radixgen.core import EngineDead, InvalidRequest, Plan, RadixgenError
from radixgen.core.settings import as_rank_0
from radixgen.model.base import Logits
from radixgen.model.collectives import Rank, use_plain_collectives
from radixgen.model.graphs import Agree
from radixgen.model.loader import LoadedModel, check_shards, load, resolve_device
from radixgen.model.lockstep import ModelInput, PlanOrigins, RankCommand, RankJob, pack, pack_step
from radixgen.model.rank_all_reduce import RANK_ALL_REDUCE
from radixgen.model.rank_host_kv import SharedHostKV
from radixgen.model.ranks import START_SECONDS, Followers, StepDeadline, bound_steps, join, watch_steps
from radixgen.model.runner import WARM_UP_SLOTS, ModelRunner
from radixgen.model.sharded_logits import RankLogits, StepOfRanks, shard_logits
from radixgen.model.tree_model import TreeModel
from radixgen.model.warm_up import WarmUpStep

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

logger = logging.getLogger(__name__)

_NO_TOKENS = np.empty(0, np.int64)


class ParallelModel:
    """A `Model` over the shards of rank 0 and its followers.

    Ranks that do not run the same step would wait for each other forever. Therefore a step that fails on any rank ends
    the model: from then on every call raises `EngineDead`.
    """

    def __init__(
        self, runner: ModelRunner, followers: Followers, kv_room: int, logits: RankLogits | None = None
    ) -> None:
        """`kv_room`: total bytes available to the pools of all ranks. `logits`: keeps those of the last step, if each
        rank has only its own.
        """
        self.name = runner.name
        self.vocab_size = runner.vocab_size
        self.max_model_len = runner.max_model_len
        self.eos_token_ids = runner.eos_token_ids
        self.costs = runner.costs
        self.kv_room = kv_room
        self.runner = runner
        self.followers = followers
        self._size = followers.job.size
        self.kv_bytes_per_token = self._size * runner.kv_bytes_per_token
        """Over all ranks, like all byte counts here."""
        self.kv_bytes_read = 0
        self.kv_bytes_unshared = 0
        self.gather_logits = False
        """Whether to gather all logits in every step, even if ranks could draw from their own."""
        self._logits = logits
        self._origins = PlanOrigins()
        self._dead = ""
        """Why the model has failed; empty while it works."""
        self._last: StepDeadline | None = None
        if self.device.type == "cuda":
            self._last = StepDeadline()
            threading.Thread(
                target=watch_steps, args=(self._last, followers.ended), name="radixgen-steps", daemon=True
            ).start()

    @property
    def device(self) -> torch.device:
        """The device of rank 0."""
        return self.runner.device

    @property
    def failed_captures(self) -> int:
        """As `ModelRunner.failed_captures`."""
        return self.runner.failed_captures

    def allocate(self, slots: int) -> None:
        """As `Model.allocate`. If any rank runs out of memory, all pools become empty and its error is raised."""
        try:
            self._allocate(slots)
        except (MemoryError, RuntimeError, ValueError):
            self._allocate(0)
            raise

    def host_kv(self, slots: int) -> SharedHostKV:
        """As `radixgen.model.base.SupportsHostKV`. Each rank keeps the KV of its heads."""
        own = self._on_all_ranks(RankCommand.ALLOCATE_HOST, slots, self.runner.host_kv)
        return SharedHostKV(own, self._send)

    def run(
        self,
        plan: Plan,
        token_ids: NDArray[np.int64],
        slots: NDArray[np.int64],
        logit_rows: NDArray[np.int64],
    ) -> Logits:
        """As `Model.run`. Raises `EngineDead` if any rank fails."""
        step = ModelInput(plan, token_ids, slots, logit_rows)
        return self._of_all_ranks(self._run_on_all_ranks(RankCommand.RUN, step, partial(self.runner.run, *step)))

    @property
    def runs_ahead(self) -> bool:
        """As `radixgen.model.base.SupportsRunAhead`."""
        return not self._dead and self.runner.runs_ahead

    def run_ahead(
        self, plan: Plan, tokens: Tensor, slots: NDArray[np.int64], logit_rows: NDArray[np.int64]
    ) -> Logits | None:
        """As `radixgen.model.base.SupportsRunAhead`; all ranks have captured the same steps. Raises as `run`."""
        step = ModelInput(plan, _NO_TOKENS, slots, logit_rows)
        begin = partial(run_ahead, self.runner, plan, tokens, slots, logit_rows)
        own = self._run_on_all_ranks(RankCommand.RUN_AHEAD, step, begin)
        return None if own is None else self._of_all_ranks(own)

    def confirm_step(self) -> None:
        """As `radixgen.model.base.SupportsStepConfirmation`. A device finishes its step even if a peer has died."""
        if not self._dead and self.followers.ended.is_set():
            how = self.followers.describe_exits() or "Timed out: the ranks waited for each other"
            self._mark_dead(f"a step failed: {how}")
        if self._dead:
            raise EngineDead(self._dead)

    def warm_up_steps(self, max_rows: int, max_logits: int) -> list[Callable[[], Logits]]:
        """As `radixgen.model.base.SupportsWarmUp`, on all ranks."""
        return [partial(self._warm_up, kind) for kind in self.runner.warm_up_kinds(max_rows, max_logits)]

    def profile_run(self, max_rows: int) -> None:
        """On GPUs, run a step of `max_rows` rows before `allocate`, then set `kv_room` to the memory that remains.

        Raises `EngineDead` if there is too little memory for the step.
        """
        if self.device.type != "cuda":
            return
        self.allocate(WARM_UP_SLOTS)
        self.warm_up_steps(max_rows, 1)[0]()
        self.allocate(0)
        self.followers.send(pack(RankCommand.ROOM))
        rooms = [answer["kv_room"] for answer in self.followers.answers(START_SECONDS)]
        self.kv_room = self._size * min(kv_room(self.device), *rooms)

    def release(self) -> None:
        """Stop the other ranks and release the model."""
        self._mark_dead("it was released")
        self.runner.release()

    def _warm_up(self, kind: WarmUpStep) -> Logits:
        step = self.runner.warm_up_inputs(kind)
        return self._of_all_ranks(
            self._run_on_all_ranks(RankCommand.WARM_UP, step, partial(self.runner.warm_up, *step))
        )

    def _of_all_ranks(self, own: Tensor) -> Logits:
        """Return the logits of a step, of which this rank computed `own`."""
        if self._logits is None:
            return own
        self._logits.last = own
        logits = StepOfRanks(self._logits, self._take_part)
        return logits.gather() if self.gather_logits else logits

    def _run_on_all_ranks(self, kind: RankCommand, step: ModelInput, take_part: Callable[[], T]) -> T:
        """Run a step on all ranks. Raises `EngineDead` if any of them fails."""
        result = self._take_part(pack_step(step, kind, self._origins.number(step.plan)), take_part)
        self.kv_bytes_read = self._size * self.runner.kv_bytes_read
        self.kv_bytes_unshared = self._size * self.runner.kv_bytes_unshared
        return result

    def _take_part(self, frame: bytes, take_part: Callable[[], T]) -> T:
        """Send a command to the other ranks and take part in it. Raises `EngineDead` if any rank fails."""
        if self._dead:
            raise EngineDead(self._dead)
        try:
            self.followers.send(frame)
            result = take_part()
            if self._last is not None:
                self._last.begin()
        except Exception as error:
            how = self.followers.describe_exits() or f"rank 0 raised {error!r}"
            self._mark_dead(f"a step failed: {how}")
            raise EngineDead(self._dead) from error
        except BaseException as error:
            self._mark_dead(f"a step was broken off by {error!r}")
            raise
        return result

    def _allocate(self, slots: int) -> None:
        self._on_all_ranks(RankCommand.ALLOCATE, slots, self.runner.allocate)

    def _on_all_ranks(self, kind: RankCommand, slots: int, allocate: Callable[[int], T]) -> T:
        """Allocate something on every rank. Raises what rank 0 raises, and `RuntimeError` if another one refuses."""
        self.followers.send(pack(kind, [np.array([slots])]))
        failure: Exception | None = None
        try:
            result = allocate(slots)
        except (MemoryError, OSError, RuntimeError, ValueError) as error:
            failure = error
        for rank, answer in enumerate(self.followers.answers(START_SECONDS), 1):
            if "refused" in answer and failure is None:
                failure = RuntimeError(f"rank {rank}: {answer['refused']}")
        if failure is not None:
            raise failure
        return result

    def _send(self, kind: RankCommand, arrays: list[NDArray[np.int64]]) -> None:
        """Send a command that needs no answer. Raises `EngineDead` if a rank is gone."""
        if self._dead:
            raise EngineDead(self._dead)
        try:
            self.followers.send(pack(kind, arrays))
        except Exception as error:
            self._mark_dead(f"a copy failed: {self.followers.describe_exits() or repr(error)}")
            raise EngineDead(self._dead) from error
        except BaseException as error:
            self._mark_dead(f"a copy was broken off by {error!r}")
            raise

    def _mark_dead(self, reason: str) -> None:
        self._dead = self._dead or f"{self.name}: {reason}"
        self.runner.drop_graphs()  # NCCL cannot shut down while a graph holds its collectives
        self.followers.stop()


def shard(
    name: str | Path,
    ranks: int,
    *,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    attention: str = "auto",
    max_model_len: int | None = None,
    max_step_tokens: int = 2048,
    load_format: str = "auto",
    kv_dtype: str = "auto",
    graphs: bool = False,
    max_graph_rows: int = 0,
    torch_compile: bool | None = None,
    tokenizer: "PreTrainedTokenizerBase | None" = None,
) -> tuple[ParallelModel, LoadedModel]:
    """Load `name` over `ranks` processes of this machine, including this one, with a GPU each if the machine has any.

    `load_format` and `tokenizer` as for `load`; `kv_dtype`, `graphs` and `max_graph_rows` as for `ModelRunner`.
    `torch_compile` defaults to `graphs` on GPUs.

    Raises `InvalidRequest`, `ModelNotFound` or `UnsupportedModel`, and `EngineDead` if a process fails.
    """
    place = _device_type(device, ranks)
    check_shards(name, ranks)
    job = RankJob(
        rank=0,
        size=ranks,
        store="",
        model=str(name),
        dtype=str(dtype).removeprefix("torch."),
        device=place,
        attention=attention,
        max_model_len=max_model_len,
        max_step_tokens=max_step_tokens,
        threads=torch.get_num_threads(),
        load_format=load_format,
        kv_dtype=kv_dtype,
        graphs=graphs,
        max_graph_rows=max_graph_rows,
        torch_compile=graphs and place == "cuda" if torch_compile is None else torch_compile,
    )
    try:
        followers = Followers(job)
    except OSError as error:
        raise EngineDead(f"{name}: {ranks} ranks did not start: {error}") from error
    try:
        followers.answers(START_SECONDS)
        if place == "cuda":
            torch.cuda.set_device(0)  # in this thread, since steps may run in it
        with as_rank_0():
            runner, loaded, logits = followers.run_watched(
                partial(_join_and_load, followers.job, followers.agree, tokenizer)
            )
        rooms = [kv_room(runner.device), *(answer["kv_room"] for answer in followers.answers(START_SECONDS))]
        return ParallelModel(runner, followers, min(rooms) * (ranks if place == "cuda" else 1), logits), loaded
    except BaseException as error:
        how = followers.describe_exits() if isinstance(error, Exception) else ""
        followers.stop()
        if not isinstance(error, Exception) or (isinstance(error, RadixgenError) and (not how or str(error) in how)):
            raise
        raise EngineDead(f"{name}: {ranks} ranks did not start: {how or f'rank 0 raised {error!r}'}") from error


def _join_and_load(
    job: RankJob, agree: Agree, tokenizer: "PreTrainedTokenizerBase | None"
) -> tuple[ModelRunner, LoadedModel, RankLogits | None]:
    join(job)
    return load_rank(job, agree, tokenizer)


def load_rank(
    job: RankJob, agree: Agree, tokenizer: "PreTrainedTokenizerBase | None" = None
) -> tuple[ModelRunner, LoadedModel, RankLogits | None]:
    """Load one rank's shard. All ranks load at the same time, because probing a `TreeModel` runs steps on all.

    The `RankLogits` draw from the logits if each rank has only its own columns of them.
    """
    rank = Rank(job.rank, job.size)
    loaded = load(
        job.model,
        job.dtype,
        job.device,
        load_format=job.load_format,
        ranks=job.size,
        rank=job.rank,
        tokenizer=tokenizer,
    )
    plain = use_plain_collectives(loaded.model, rank)
    if not plain:
        logger.warning("%s: its plan is run by transformers' own code, neither compiled nor captured", loaded.name)
    tree_model = TreeModel(loaded.model, loaded.name, job.max_model_len, job.max_step_tokens)
    logits = shard_logits(tree_model, rank, agree) if plain else None
    bound_steps(loaded.model)
    if plain and job.device == "cuda":
        tree_model.fuse_linears()
    if plain and job.torch_compile:
        tree_model.compile_blocks()
        if not agree(tree_model.compiles()):
            tree_model.uncompile()
    runner = ModelRunner(
        tree_model,
        job.attention,
        loaded.eos_token_ids,
        kv_dtype=job.kv_dtype,
        graphs=plain and job.graphs,
        max_graph_rows=job.max_graph_rows,
        agree=agree,
    )
    return runner, loaded, logits


def run_ahead(
    model: ModelRunner,
    plan: Plan,
    tokens: Tensor | None,
    slots: NDArray[np.int64],
    logit_rows: NDArray[np.int64],
) -> Tensor | None:
    """As `radixgen.model.base.SupportsRunAhead`, on every rank. `tokens` are given on rank 0 and received on the
    others.
    """
    if tokens is None:
        tokens = torch.zeros(logit_rows.size, dtype=torch.int64, device=model.device)
    RANK_ALL_REDUCE.all_reduce(tokens.view(torch.int32))
    return model.run_ahead(plan, tokens, slots, logit_rows)


def _device_type(device: str, ranks: int) -> str:
    """Return `"cpu"` or `"cuda"`. Raises `InvalidRequest` if the ranks cannot use it."""
    gpus = torch.cuda.device_count()
    if resolve_device(device) != torch.device("cuda" if gpus else "cpu"):
        raise InvalidRequest("device", device, "must be auto: ranks take the first GPUs of a machine that has any")
    if gpus and gpus < ranks:
        raise InvalidRequest("tensor_parallel_size", ranks, f"must be at most {gpus}, the number of GPUs")
    if dist.is_initialized():
        raise InvalidRequest("tensor_parallel_size", ranks, "this process is in a process group already")
    return "cuda" if gpus else "cpu"
