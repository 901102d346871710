"""What an exported decoder step says of itself, and the names of its inputs and outputs.

Inputs, of a step of `rows` rows of which `n` give logits; w counts the different windows of the layers, g the groups of
units (`radixgen.kernels.unit_groups`), l the layers:

| name | dtype, shape |
| --- | --- |
| `token_ids`, `positions`, `write_slots` | int64 `[rows]`; a row whose KV exists writes to the pool's last slot |
| `logit_rows` | int64 `[n]` |
| `keys_l`, `values_l` | float32 `[kv_heads * slots, head_dim]`, `[kv_heads * slots, v_head_dim]`, by head |
| `unit_rows_w_g` | int64 `[pieces, unit rows]` |
| `unit_slots_w_g` | int64 `[pieces, unit keys]` |
| `unit_bias_w_g` | float32 `[pieces, unit rows, unit keys]` |
| `partials_w` | int64 `[rows, most]` |

Outputs: `logits` float32 `[n, vocab]`; `new_keys_l` and `new_values_l`, the pool with the rows' K and V written. A
runtime that is given the pool's own memory for them writes in place.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from radixgen.core import Chunk, InvalidRequest, UnsupportedModel, Window

MODEL_FILE = "model.onnx"
METADATA = "radixgen"
"""Key of the step's description in the metadata of an ONNX file."""
FORMAT = 1
"""Version of the inputs and outputs."""


@dataclass(frozen=True, slots=True)
class StepBounds:
    """Maximum sizes of a step."""

    groups: int = 4
    """Groups of units, exactly."""
    rows: int = 2048
    units: int = 4096
    """Units of a group, and partial results of a row."""
    keys: int = 1 << 20
    """Keys of a unit."""

    @staticmethod
    def check(field: str, value: int, most: int) -> None:
        """Raise `InvalidRequest` if a step exceeds the bound `most`."""
        if value > most:
            raise InvalidRequest(field, value, f"must be at most {most}, a bound of the exported model")


@dataclass(frozen=True, slots=True)
class StepDescription:
    """An exported decoder step."""

    name: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    layers: tuple[tuple[int, int, int], ...]
    """KV heads, head size, and head size of values, of each layer."""
    windows: tuple[Window | None, ...]
    """Window of each layer."""
    bounds: StepBounds = field(default_factory=StepBounds)

    @property
    def distinct_windows(self) -> tuple[Window | None, ...]:
        return tuple(dict.fromkeys(self.windows))

    def table_names(self, kind: str) -> list[list[str]]:
        """Return the names of `unit_rows`, `unit_slots` or `unit_bias`, by window and group."""
        return [[f"{kind}_{w}_{g}" for g in range(self.bounds.groups)] for w in range(len(self.distinct_windows))]

    def partials_names(self) -> list[str]:
        return [f"partials_{w}" for w in range(len(self.distinct_windows))]

    def pool_names(self, prefix: str = "") -> list[str]:
        """Return the names of the inputs that hold the pool, keys first; with `"new_"` those of its outputs."""
        return [f"{prefix}{kind}_{layer}" for kind in ("keys", "values") for layer in range(len(self.layers))]

    def input_names(self) -> list[str]:
        tables = [self.table_names(kind) for kind in ("unit_rows", "unit_slots", "unit_bias")]
        flat = [name for by_window in tables for names in by_window for name in names]
        return [
            "token_ids",
            "positions",
            "logit_rows",
            "write_slots",
            *self.pool_names(),
            *flat,
            *self.partials_names(),
        ]

    def output_names(self) -> list[str]:
        return ["logits", *self.pool_names("new_")]

    def to_json(self) -> str:
        windows = [{"chunk": w.size} if isinstance(w, Chunk) else w for w in self.windows]
        return json.dumps({"format": FORMAT, **asdict(self), "windows": windows})

    @classmethod
    def from_json(cls, text: str) -> "StepDescription":
        """Raises `UnsupportedModel` for another format."""
        fields: dict[str, Any] = json.loads(text)
        if fields.pop("format") != FORMAT:
            raise UnsupportedModel("the ONNX file has another version of the inputs: export the model again")
        return cls(
            **fields
            | {
                "eos_token_ids": tuple(fields["eos_token_ids"]),
                "layers": tuple(map(tuple, fields["layers"])),
                "windows": tuple(Chunk(w["chunk"]) if isinstance(w, dict) else w for w in fields["windows"]),
                "bounds": StepBounds(**fields["bounds"]),
            }
        )


def is_exported(model: object) -> TypeGuard[str | Path]:
    """Return whether `model` is a directory that `radixgen export` has written."""
    return isinstance(model, str | Path) and (Path(model).expanduser() / MODEL_FILE).is_file()
