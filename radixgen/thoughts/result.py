"""What a search has found, and its form on disk: JSON, read back with every field checked."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from radixgen.core import InvalidRequest, Limits, check_integer
from radixgen.thoughts.budget import ENDED, Ended
from radixgen.thoughts.thought import Cost, Thought

_VERSION = 1
_KINDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "state": (str,),
    "token_ids": (list, type(None)),
    "score": (int, float, type(None)),
    "expanded": (bool,),
    "solved": (bool,),
    "pruned": (bool,),
    "visits": (int,),
    "total": (int, float),
    "merged": (int,),
    "error": (str, type(None)),
}
"""The fields of a thought that are kept as they are"""


@dataclass(eq=False, slots=True)
class Result:
    """A tree of thoughts, as it stands.

    thoughts: in the order in which they came; the first is the root.
    cost: of all that was asked, for thoughts that are in the tree or not. computed_rows: rows that went through the
    model meanwhile, those of other requests among them.
    """

    thoughts: list[Thought]
    seed: int
    ended: Ended = "cancelled"
    cost: Cost = field(default=Cost())
    computed_rows: int = 0
    seconds: float = 0.0

    @property
    def root(self) -> Thought:
        return self.thoughts[0]

    @property
    def solutions(self) -> list[Thought]:
        """The thoughts that passed `goal`, in the order in which they came."""
        return [thought for thought in self.thoughts if thought.solved]

    @property
    def expansions(self) -> int:
        """Thoughts whose steps were proposed."""
        return sum(thought.expanded for thought in self.thoughts)

    @property
    def best(self) -> Thought:
        """The best solution; without one, of the thoughts that have a score the best of the deepest, for a score is
        compared within its level alone; without scores, the deepest. Of equals, the one that came first.
        """

        def merit(thought: Thought) -> tuple[bool, bool, int, float, int]:
            depth = 0 if thought.solved else thought.depth
            score = -math.inf if thought.score is None else thought.score
            return thought.solved, thought.score is not None, depth, score, -thought.id

        return max(self.thoughts, key=merit)

    def to_json(self) -> str:
        """Everything, in one line. A search goes on from it: `search(..., resume=Result.from_json(text))`."""
        record = {
            "version": _VERSION,
            "seed": self.seed,
            "ended": self.ended,
            "cost": asdict(self.cost),
            "computed_rows": self.computed_rows,
            "seconds": self.seconds,
            "thoughts": [_record(thought) for thought in self.thoughts],
        }
        return json.dumps(record, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "Result":
        """Raises `InvalidRequest`."""
        try:
            record = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest("json", text, f"must be a search in JSON: {error}") from error
        if not isinstance(record, dict) or record.get("version") != _VERSION:
            raise InvalidRequest("version", text, f"must be a search in version {_VERSION}")
        records = _field(record, "thoughts", list)
        check_integer("len(thoughts)", len(records), 1, Limits().max_thoughts)
        ended = _field(record, "ended", str)
        if ended not in ENDED:
            raise InvalidRequest("ended", ended, f"must be one of {', '.join(ENDED)}")
        thoughts: list[Thought] = []
        for one in records:
            thoughts.append(_thought(one, thoughts))
        return cls(
            thoughts,
            _field(record, "seed", int),
            ended,
            _cost(record),
            _field(record, "computed_rows", int),
            float(_field(record, "seconds", int, float)),
        )


def _record(thought: Thought) -> dict[str, Any]:
    parent = None if thought.parent is None else thought.parent.id
    kept = {name: getattr(thought, name) for name in _KINDS}
    return {"parent": parent, **kept, "cost": asdict(thought.cost)}


def _thought(record: object, before: list[Thought]) -> Thought:
    """The next thought of a tree; its parent is among those `before`."""
    if not isinstance(record, dict):
        raise InvalidRequest("thought", record, "must be an object")
    values = {name: _field(record, name, *kinds) for name, kinds in _KINDS.items()}
    if values["token_ids"] is not None and not all(type(token) is int for token in values["token_ids"]):
        raise InvalidRequest("token_ids", values["token_ids"], "must be integers")
    place = _field(record, "parent", int, type(None))
    if (place is None) == bool(before) or (place is not None and not 0 <= place < len(before)):
        raise InvalidRequest("parent", place, f"must be a thought before number {len(before)}, and null for the first")
    parent = None if place is None else before[place]
    thought = Thought(values.pop("text"), values.pop("state"), parent, len(before), cost=_cost(record))
    for name, value in values.items():
        setattr(thought, name, value)
    if parent is not None:
        parent.children.append(thought)
    return thought


def _cost(record: dict[str, Any]) -> Cost:
    found = _field(record, "cost", dict)
    names = [one.name for one in fields(Cost)]
    for name in names:
        check_integer(name, found.get(name), 0, 2**63 - 1)
    return Cost(*(found[name] for name in names))


def _field(record: dict[str, Any], name: str, *kinds: type) -> Any:
    value = record.get(name, _MISSING)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise InvalidRequest(name, value, f"must be {' or '.join(kind.__name__ for kind in kinds)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(name, value, "must be finite")
    return value


_MISSING = object()
