"""The cost model of a device: measured once, kept in the cache directory, or shipped for devices we have measured."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from radixgen.core.settings import cache_dir
from radixgen.kernels import Attention, backend
from radixgen.kernels.geometry import Geometry
from radixgen.scheduler.cost import CostModel, TileCost
from radixgen.scheduler.planner import Forest, plan

_BYTES = 512
"""K and V of one key and head where the constants were measured: head_dim 128, 16 bit."""
_KV_HEADS, _GROUP = 8, 4
_SHIPPED = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Microseconds of one program, for one KV head of 128 + 128 dimensions in 16 bit."""

    device: str
    programs: int
    tiles: tuple[TileCost, ...]
    partial: float
    first_key: float

    def cost_model(self, geometry: Geometry) -> CostModel:
        """The costs of layers of this shape: those of keys and partials go with their bytes."""
        width = (geometry.head_dim + geometry.v_head_dim) * geometry.dtype.itemsize / _BYTES
        return CostModel(
            tiles=tuple(replace(tile, key=tile.key * width) for tile in self.tiles),
            partial=self.partial * geometry.v_head_dim / 128,
            first_key=self.first_key * width,
            group=geometry.group,
            kv_heads=geometry.kv_heads,
            programs=self.programs,
            mix=True,
        )


def cost_model(device: torch.device, geometry: Geometry) -> CostModel:
    """For layers of this shape on `device`: as calibrated there, else as shipped for a device of this name or, last, for
    the H100. The default `CostModel` where no kernel of ours runs.
    """
    if device.type != "cuda" or not geometry.supported:
        return CostModel()
    name = torch.cuda.get_device_name(device)
    known = {entry.device: entry for path in (_SHIPPED, _kept(name)) for entry in _read(path)}
    return known.get(name, next(iter(known.values()))).cost_model(geometry)


def keep(calibration: Calibration) -> Path:
    """Write a calibration to the cache directory, where `cost_model` finds it."""
    path = _kept(calibration.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(calibration)], indent=1))
    return path


def _kept(name: str) -> Path:
    return cache_dir() / "calibration" / f"{name.replace(' ', '-').replace('/', '-')}.json"


def _read(path: Path) -> list[Calibration]:
    if not path.is_file():
        return []
    entries = json.loads(path.read_text())
    return [Calibration(**entry | {"tiles": tuple(TileCost(**tile) for tile in entry["tiles"])}) for entry in entries]


def calibrate(device: torch.device, time_us: Callable[[Callable[[], object]], float]) -> Calibration:
    """Measure `device`, in some seconds; `time_us` gives the median microseconds of a call, launches excluded."""
    measure = _Measure(device, time_us)
    programs = 2 * torch.cuda.get_device_properties(device).multi_processor_count
    tiles = []
    for rows in (16, 64):
        per_tile = rows // _GROUP
        many, keys = 16 * programs // _KV_HEADS, 64
        short = measure.tiles(nodes=many, rows=per_tile, keys=keys, tile=rows)
        shorter = measure.tiles(nodes=many // 2, rows=per_tile, keys=keys, tile=rows)
        unit = (short - shorter) * programs / (many - many // 2) / _KV_HEADS
        tall = 4 * programs // _KV_HEADS
        long = measure.tiles(nodes=1, rows=per_tile * tall, keys=8192, tile=rows)
        half = measure.tiles(nodes=1, rows=per_tile * tall, keys=4096, tile=rows)
        key = (long - half) * programs / 4096 / tall / _KV_HEADS
        tiles.append(TileCost(rows, max(unit - keys * key, 0.0), key))
    apart = measure.tiles(nodes=64, rows=1, keys=4096, tile=16)
    first_key = max(apart * programs / (64 * 4096 * _KV_HEADS) - tiles[0].key, 0.0)
    return Calibration(
        device=torch.cuda.get_device_name(device),
        programs=programs,
        tiles=tuple(tiles),
        partial=measure.partials(programs),
        first_key=first_key,
    )


class _Measure:
    """Times attention over trees made for the purpose."""

    def __init__(self, device: torch.device, time_us: Callable[[Callable[[], object]], float]) -> None:
        self.device = device
        self.time_us = time_us

    def tiles(self, *, nodes: int, rows: int, keys: int, tile: int) -> float:
        """Nodes of `keys` keys, side by side, with `rows` rows in each, in tiles of one class."""
        return self._time(np.full(nodes, -1), np.full(nodes, keys), np.repeat(np.arange(nodes), rows), tile, "unshared")

    def partials(self, programs: int) -> float:
        """What one row of one partial adds: the same keys in one node, and in a chain of nine that are all units."""
        rows = 1024
        parents, leaves = np.arange(-1, 8), np.full(rows, 8)
        chain = self._time(parents, np.full(9, 64), leaves, 64, "naive")
        whole = self._time(parents, np.full(9, 64), leaves, 64, "unshared")
        return max(chain - whole, 0.0) * programs / (rows * _GROUP * _KV_HEADS * 8)

    def _time(self, parents: np.ndarray, lengths: np.ndarray, rows: np.ndarray, tile: int, mode: str) -> float:
        starts = np.zeros_like(lengths)
        for node, parent in enumerate(parents.tolist()):
            if parent >= 0:
                starts[node] = starts[parent] + lengths[parent]
        ends = np.cumsum(lengths)
        forest = Forest(parents, starts, lengths, np.arange(parents.size + 1), ends - lengths, lengths)
        cost = CostModel(tiles=(TileCost(tile, 1.0, 1.0),), group=_GROUP)
        made = plan(forest, rows, (starts + lengths - 1)[rows], mode=mode, cost=cost)  # type: ignore[arg-type]
        attention: Attention = backend("triton", self.device).attention(made, None, self.device)
        q = torch.randn(rows.size, _KV_HEADS * _GROUP, 128, device=self.device, dtype=torch.bfloat16)
        k, v = torch.randn(2, int(ends[-1]), _KV_HEADS, 128, device=self.device, dtype=torch.bfloat16)
        return self.time_us(lambda: attention(q, k, v, 128**-0.5))
