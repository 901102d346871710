"""Reading policies: inexact reading of KV, on request. See `docs/inexact.md`."""

from radixgen.core.reading import (
    BigBird,
    Exact,
    Fading,
    PositionPolicy,
    Press,
    ReadingPolicy,
    TopBlocks,
    Window,
    reading_from_json,
    reading_to_json,
)

__all__ = [
    "BigBird",
    "Exact",
    "Fading",
    "PositionPolicy",
    "Press",
    "ReadingPolicy",
    "TopBlocks",
    "Window",
    "reading_from_json",
    "reading_to_json",
]
