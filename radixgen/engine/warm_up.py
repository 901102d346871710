"""Warm-up of an engine, so that no request waits for compilation or graph capture."""

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from radixgen.core import EngineDead
from radixgen.kernels.drawable_tokens import DrawableTokens
from radixgen.model.base import Logits, Model, SupportsWarmUp
from radixgen.sampling.sampler import warm_up_sampling

logger = logging.getLogger(__name__)


def warm_up_steps(
    model: Model, drawable: DrawableTokens | None, max_rows: int, max_draws: int
) -> list[Callable[[], None]]:
    """Return one call for each kind of step of up to `max_rows` rows and `max_draws` draws; empty if the model needs no
    warm-up.

    Each call runs the model and samples in each way. They are made in order, while no step of the model is in flight,
    and leave nothing behind. A failing step is logged as a warning; the first request that needs it will see the error.
    """
    if not isinstance(model, SupportsWarmUp):
        return []
    return [partial(_warm_up, model.name, run, drawable) for run in model.warm_up_steps(max_rows, max_draws)]


def run_warm_up(steps: Sequence[Callable[[], None]], progress: Callable[[int, int], None] | None) -> None:
    """Make the calls of `warm_up_steps`, calling `progress(done, total)` after each."""
    began = time.monotonic()
    for done, step in enumerate(steps, 1):
        step()
        if progress is not None:
            progress(done, len(steps))
    if steps:
        logger.info("warmed up %d kinds of steps in %.1f seconds", len(steps), time.monotonic() - began)


def announce_warm_up(say: Callable[[str], None]) -> Callable[[int, int], None]:
    """Return a `progress(done, total)` for `Engine.warm_up` that reports each tenth of the steps."""

    def progress(done: int, total: int) -> None:
        if 10 * done // total > 10 * (done - 1) // total:
            say(f"warming up: {done} of {total} kinds of steps")

    return progress


def _warm_up(name: str, run: Callable[[], Logits], drawable: DrawableTokens | None) -> None:
    try:
        logits = run()
        if len(logits):
            warm_up_sampling(logits, drawable)
    except (AssertionError, EngineDead):
        raise
    except Exception as error:
        logger.warning("%s: a kind of step could not be warmed up: %s", name, error)
