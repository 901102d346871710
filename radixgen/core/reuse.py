"""What a prompt takes from the cache: its longest prefix, or also runs of tokens that stand elsewhere there."""

from dataclasses import dataclass
from typing import Literal, get_args

from radixgen.core.errors import InvalidRequest, check_integer

Reuse = Literal["prefix", "segments"]
REUSES: tuple[Reuse, ...] = get_args(Reuse)

_MAX_RUN = 2**20


@dataclass(frozen=True, slots=True)
class SegmentReuse:
    """Settings of `reuse="segments"`: how long a run must be, and how much of it is computed anew.

    `min_run`: shortest run, in tokens. `recompute`: share of a run's tokens, its first ones, that are computed although
    their KV is cached, from 0 to 1. The rest is copied with its keys moved, so that outputs are inexact.
    """

    min_run: int = 64
    recompute: float = 0.15

    def __post_init__(self) -> None:
        check_integer("min_run", self.min_run, 2, _MAX_RUN)
        if isinstance(self.recompute, bool) or not isinstance(self.recompute, int | float):
            raise InvalidRequest("recompute", self.recompute, "must be a number from 0 to 1")
        if not 0.0 <= self.recompute <= 1.0:
            raise InvalidRequest("recompute", self.recompute, "must be from 0 to 1")


def check_reuse(reuse: object) -> None:
    """Raise `InvalidRequest` unless `reuse` is one of `REUSES`."""
    if reuse not in REUSES:
        raise InvalidRequest("reuse", reuse, f"must be one of {', '.join(REUSES)}")


def segment_reuse(reuse: "Reuse | SegmentReuse", share: bool) -> SegmentReuse | None:
    """Return the settings of an engine's `reuse`, or None for `"prefix"`. Raises `InvalidRequest`, also if nothing is
    shared.
    """
    if not isinstance(reuse, SegmentReuse):
        check_reuse(reuse)
        if reuse == "prefix":
            return None
        reuse = SegmentReuse()
    if not share:
        raise InvalidRequest("reuse", reuse, "needs share=True")
    return reuse
