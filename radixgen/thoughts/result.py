"""Result of a search, and its JSON format, which is validated when it is read."""

import json
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from radixgen.core import InvalidRequest, Limits, check_integer
from radixgen.thoughts.budget import END_REASONS, EndReason
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
"""Fields of a thought that are stored unchanged, with their types"""


@dataclass(eq=False, slots=True)
class Result:
    """Tree of thoughts of a finished or running search.

    thoughts: in the order in which they were added; the first is the root.
    ended: why the search ended.
    cost: cost of all requests, also for thoughts that are not in the tree.
    computed_rows: rows that the model computed during the search, including those of other requests.
    seconds: duration of the search.
    """

    thoughts: list[Thought]
    seed: int
    ended: EndReason = "cancelled"
    cost: Cost = field(default=Cost())
    computed_rows: int = 0
    seconds: float = 0.0

    @property
    def root(self) -> Thought:
        """First thought: the problem."""
        return self.thoughts[0]

    @property
    def solutions(self) -> list[Thought]:
        """Thoughts that passed `goal`, in the order in which they were added."""
        return [thought for thought in self.thoughts if thought.solved]

    @property
    def expansions(self) -> int:
        """Number of expanded thoughts."""
        return sum(thought.expanded for thought in self.thoughts)

    @property
    def best(self) -> Thought:
        """The best solution. Without solutions, the best of the deepest thoughts with a score, since scores are only
        comparable within a level; without scores, the deepest thought. Ties go to the earliest thought.
        """

        def merit(thought: Thought) -> tuple[bool, bool, int, float, int]:
            depth = 0 if thought.solved else thought.depth
            score = -math.inf if thought.score is None else thought.score
            return thought.solved, thought.score is not None, depth, score, -thought.id

        return max(self.thoughts, key=merit)

    def to_json(self) -> str:
        """Encode as one line of JSON, from which a search can resume: `search(..., resume=Result.from_json(text))`."""
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
        """Decode the output of `to_json`. Raises `InvalidRequest`."""
        try:
            record = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest("json", text, f"must be a search in JSON: {error}") from error
        if not isinstance(record, dict) or record.get("version") != _VERSION:
            raise InvalidRequest("version", text, f"must be a search in version {_VERSION}")
        records = _field(record, "thoughts", list)
        check_integer("len(thoughts)", len(records), 1, Limits().max_thoughts)
        ended = _field(record, "ended", str)
        if ended not in END_REASONS:
            raise InvalidRequest("ended", ended, f"must be one of {', '.join(END_REASONS)}")
        thoughts: list[Thought] = []
        for entry in records:
            thoughts.append(_thought(entry, thoughts))
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
    """Decode the next thought of a tree; its parent is among those `before`."""
    if not isinstance(record, dict):
        raise InvalidRequest("thought", record, "must be an object")
    values = {name: _field(record, name, *kinds) for name, kinds in _KINDS.items()}
    if values["token_ids"] is not None and not all(type(token) is int for token in values["token_ids"]):
        raise InvalidRequest("token_ids", values["token_ids"], "must be integers")
    index = _field(record, "parent", int, type(None))
    if (index is None) == bool(before) or (index is not None and not 0 <= index < len(before)):
        raise InvalidRequest("parent", index, f"must be a thought before number {len(before)}, and null for the first")
    parent = None if index is None else before[index]
    thought = Thought(values.pop("text"), values.pop("state"), parent, len(before), cost=_cost(record))
    for name, value in values.items():
        setattr(thought, name, value)
    if parent is not None:
        parent.children.append(thought)
    return thought


def _cost(record: dict[str, Any]) -> Cost:
    cost = _field(record, "cost", dict)
    names = [field.name for field in fields(Cost)]
    for name in names:
        check_integer(name, cost.get(name), 0, 2**63 - 1)
    return Cost(*(cost[name] for name in names))


def _field(record: dict[str, Any], name: str, *kinds: type) -> Any:
    value = record.get(name, _MISSING)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise InvalidRequest(name, value, f"must be {' or '.join(kind.__name__ for kind in kinds)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(name, value, "must be finite")
    return value


_MISSING = object()
