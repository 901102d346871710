"""Reading policies: inexact reading of KV, on request. See `docs/inexact.md`."""

from radixgen.core.reading import (
    BigBird,
    Exact,
    PositionPolicy,
    ReadingPolicy,
    Window,
    reading_from_json,
    reading_to_json,
)

__all__ = ["BigBird", "Exact", "PositionPolicy", "ReadingPolicy", "Window", "reading_from_json", "reading_to_json"]
