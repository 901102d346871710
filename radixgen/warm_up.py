"""What an engine runs before anybody waits for it, so that no request waits while something is compiled or captured."""

import logging
from collections.abc import Callable
from functools import partial

from torch import Tensor

from radixgen.core import EngineDead
from radixgen.model.base import Model, SupportsWarmUp
from radixgen.sampling import DrawableTokens, draw_each_way

logger = logging.getLogger(__name__)


def warm_up_steps(
    model: Model, drawable: DrawableTokens | None, max_rows: int, max_draws: int
) -> list[Callable[[], None]]:
    """A call for each kind of step of up to `max_rows` rows and `max_draws` draws, to be made in their order while no
    step of the model's is under way: it runs the model, and draws tokens in each way. None where the model's first
    steps are as quick as any.

    They leave nothing behind. A step that fails is logged as a warning, and left to whoever needs it.
    """
    if not isinstance(model, SupportsWarmUp):
        return []
    return [partial(_warm_up, model.name, run, drawable) for run in model.warm_up_steps(max_rows, max_draws)]


def announce_warm_up(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """A `progress(done, total)` for `Engine.warm_up` that says how far it is, at each tenth of the steps."""

    def progress(done: int, total: int) -> None:
        if 10 * done // total > 10 * (done - 1) // total:
            say(f"warming up: {done} of {total} kinds of steps")

    return progress


def _warm_up(name: str, run: Callable[[], Tensor], drawable: DrawableTokens | None) -> None:
    try:
        logits = run()
        if len(logits):
            draw_each_way(logits, drawable)
    except (AssertionError, EngineDead):
        raise
    except Exception as error:
        logger.warning("%s: a kind of step could not be warmed up: %s", name, error)
