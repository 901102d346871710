"""`PrefixPins`: keeps prefixes cached for callers, and computes them in advance."""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from functools import partial
from typing import Unpack

from radixgen.core import LimitReached, SamplingParams
from radixgen.core.reading import ReadingPolicy, check_reading
from radixgen.engine.core import EngineCore
from radixgen.engine.input_processor import InputProcessor, Prompt, as_prompts
from radixgen.engine.request_loop import RequestLoop
from radixgen.engine.request_options import CoreOptions, PinOptions
from radixgen.engine.submitter import RequestSubmitter

PRELOADING = SamplingParams(temperature=0.0, max_tokens=1)
"""Parameters that add nothing but the prompt to the tree: the one token drawn never enters it."""


class PrefixPins:
    """Pins for `Engine`, whose methods of the same names describe arguments and errors."""

    def __init__(
        self,
        inputs: InputProcessor,
        core: EngineCore,
        loop: RequestLoop,
        submitter: RequestSubmitter,
        clock: Callable[[], float],
    ) -> None:
        self._inputs = inputs
        self._core = core
        self._pins = core.scheduler.pins
        self._loop = loop
        self._submitter = submitter
        self._clock = clock

    @property
    def ids(self) -> frozenset[int]:
        return frozenset(pin.id for pin in self._pins)

    def pin(self, prompt: Prompt, replaces: int | None = None, **options: Unpack[PinOptions]) -> int | None:
        self._loop.begin_call()
        tokens = self._inputs.tokenize(prompt)
        expires = self._check(**options)
        path, namespace = self._core.place_of(tokens, options.get("reading"), options.get("namespace", ""))
        with self._core.guard:
            self._release(replaces)
            self._require_room(1)
            whole = namespace != options.get("namespace", "")  # a part of a pressed prompt is of no use
            pin = self._pins.add(path, namespace, options.get("priority", 0), expires, whole=whole)
            return pin.id if pin else None

    def unpin(self, pin: int) -> bool:
        self._loop.begin_call()
        with self._core.guard:
            return self._release(pin)

    def preload(self, prompts: Prompt | Seq[Prompt], **options: Unpack[PinOptions]) -> list[int | None]:
        self._loop.begin_call()
        tokens = [self._inputs.tokenize(prompt) for prompt in as_prompts(prompts)]
        params = replace(PRELOADING, reading=options.get("reading"))
        for ids in tokens:
            self._inputs.check(ids, params)
        self._check(**options)
        self._require_room(len(tokens))
        place = CoreOptions(namespace=options.get("namespace", ""), priority=options.get("priority", 0))
        self._loop.serve(
            [partial(self._submitter.submit_checked, ids, params, reuse="prefix", **place) for ids in tokens]
        )
        return [self.pin(ids, **options) for ids in tokens]

    def _check(
        self, namespace: str = "", priority: int = 0, ttl: float | None = None, reading: ReadingPolicy | None = None
    ) -> float:
        """Check the options of a pin and return its time of expiry. Releases expired pins."""
        self._inputs.check_place(namespace, priority)
        if reading is not None:
            check_reading("reading", reading)
        lifetime, now = self._inputs.check_seconds("ttl", ttl), self._clock()
        with self._core.guard:
            self._pins.expire(now)
        return now + lifetime

    def _require_room(self, count: int) -> None:
        """Raise `LimitReached` if this many more pins exceed the limit. Pins of cache hints make room."""
        limit = self._core.limits.max_pins
        while len(self._pins) + count > limit and self._pins.release_from_largest(0):
            pass
        pins = len(self._pins) + count
        if pins > limit:
            raise LimitReached("pins", pins, f"at most {limit} prefixes are pinned")

    def _release(self, pin: int | None) -> bool:
        """Release a pin. Returns False, also for other objects, if there is none."""
        if not isinstance(pin, int) or pin not in self._pins:
            return False
        self._pins.release(pin)
        return True
