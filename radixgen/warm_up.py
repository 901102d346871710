"""What an engine runs before anybody waits for it, so that no request waits while something is compiled or captured."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from radixgen.core import EngineDead
from radixgen.model.base import Model, WarmsUp
from radixgen.sampling import Drawable, draw_each_way

logger = logging.getLogger(__name__)


def warm_up_steps(model: Model, drawable: Drawable | None, max_rows: int, max_draws: int) -> list[Callable[[], None]]:
    """A call for each kind of step of up to `max_rows` rows and `max_draws` draws, to be made in their order while no
    step of the model's is under way: it runs the model, and draws tokens in each way. None where the model's first
    steps are as quick as any.

    They leave nothing behind. A step that fails is logged as a warning, and left to whoever needs it.
    """
    if not isinstance(model, WarmsUp):
        return []
    return [partial(_warm_up, model.name, run, drawable) for run in model.warm_up_steps(max_rows, max_draws)]


def run_warm_up(steps: Sequence[Callable[[], None]], progress: Callable[[int, int], None] | None) -> None:
    """Make the calls of `warm_up_steps`, and `progress(done, total)` after each."""
    began = time.monotonic()
    for done, step in enumerate(steps, 1):
        step()
        if progress is not None:
            progress(done, len(steps))
    if steps:
        logger.info("warmed up %d kinds of steps in %.1f seconds", len(steps), time.monotonic() - began)


def announce_warm_up(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """A `progress(done, total)` for `Engine.warm_up` that says how far it is, at each tenth of the steps."""

    def progress(done: int, total: int) -> None:
        if 10 * done // total > 10 * (done - 1) // total:
            say(f"warming up: {done} of {total} kinds of steps")

    return progress


def _warm_up(name: str, run: Callable[[], Tensor], drawable: Drawable | None) -> None:
    try:
        logits = run()
        if len(logits):
            draw_each_way(logits, drawable)
    except (AssertionError, EngineDead):
        raise
    except Exception as error:
        logger.warning("%s: a kind of step could not be warmed up: %s", name, error)
