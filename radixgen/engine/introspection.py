"""What an engine tells about itself and its requests."""

from collections.abc import Callable
from typing import TypeVar

from radixgen.core import StateGuard, Stats
from radixgen.engine.core import EngineCore
from radixgen.engine.input_processor import InputProcessor
from radixgen.engine.request_loop import RequestLoop
from radixgen.model.base import Model
from radixgen.model.prepare import dtype_of

T = TypeVar("T")


class EngineIntrospection:
    """The part of `Engine` that reads and changes nothing."""

    _core: EngineCore
    _guard: StateGuard
    _inputs: InputProcessor
    _loop: RequestLoop
    _model: Model

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
        everything and may add listeners to the tree, but must change nothing else.
        """
        return function(self._core)

    @property
    def inputs(self) -> InputProcessor:
        """Tokenizes and checks requests. May be used from another thread."""
        return self._inputs

    @property
    def model_name(self) -> str:
        return self._model.name

    @property
    def dtype(self) -> str:
        """Data type of the weights, or of the logits if the model is not transformers'."""
        return dtype_of(self._model)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The model's own end tokens. For those of chats, see `inputs.chat_eos_token_ids`."""
        return self._model.eos_token_ids

    @property
    def max_step_tokens(self) -> int:
        return self._core.scheduler.max_step_tokens

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
