"""Cost models of devices: measured once and stored in the cache directory, or shipped for known devices."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from radixgen.core.settings import cache_dir
from radixgen.kernels.backend import backend
from radixgen.kernels.flash_backend import FlashCost
from radixgen.kernels.geometry import LEAST_RUN, Geometry
from radixgen.kernels.quantized import allocate, write
from radixgen.scheduler.cost import CostModel, TileCost
from radixgen.scheduler.forest import Forest
from radixgen.scheduler.planner import PlanMode, plan

logger = logging.getLogger(__name__)

_BYTES = 512
"""K and V of one key and head in the measurements: head_dim 128, 16 bits."""
_KV_HEADS, _GROUP = 8, 4
_SHIPPED = Path(__file__).with_name("calibration.json")


@dataclass(frozen=True, slots=True)
class Calibration:
    """Costs of a device in microseconds of one program, for one KV head of 128 + 128 dimensions in 16 bits."""

    device: str
    tiles: tuple[TileCost, ...]
    """Each class of tiles in its own launch; 128 rows only if a kernel for these was measured."""
    partial: float
    """Per query head's row, with one program running."""
    first_key: float
    """Per distinct key, with one program running."""
    launch: float
    """For each launch but the first."""
    merge: float
    flash: FlashCost | None = None
    """Costs of the flash-attn package on the whole device, if measured."""
    quantized_tiles: tuple[TileCost, ...] = ()
    """As `tiles`, over 8-bit keys; empty if not measured."""

    def cost_models(self, geometry: Geometry, *, wide: bool = False) -> tuple[CostModel, ...]:
        """Return the cost models of layers of this shape, one for each class that a plan's widest tiles may have.

        Costs of keys and partial results are scaled by their bytes; quantized keys have tiles of their own. `wide`:
        whether tiles of 128 rows have their own kernel for these layers.
        """
        width = (geometry.head_dim + geometry.v_head_dim) * geometry.dtype.itemsize / _BYTES
        measured = (geometry.quantized and self.quantized_tiles) or self.tiles
        tiles = [tile for tile in measured if tile.rows >= geometry.group and (wide or tile.rows <= 64)]
        # With large heads a multiprocessor runs half as many programs, each twice as fast.
        fewer = 2 if max(geometry.padded) > 128 else 1
        programs = tiles[0].programs // fewer
        return tuple(
            CostModel(
                tiles=tuple(_scaled(tile, width, fewer) for tile in tiles[:count]),
                partial=self.partial * programs * geometry.v_head_dim / 128,
                first_key=self.first_key * programs * geometry.key_bytes / _BYTES,
                group=geometry.group,
                kv_heads=geometry.kv_heads,
                programs=programs,
                merge=self.merge,
                launch=self.launch,
                least_run=LEAST_RUN,
                mix=True,
            )
            for count in range(1, len(tiles) + 1)
        )


def _scaled(tile: TileCost, width: float, fewer: int) -> TileCost:
    """Scale a cost to `width` times the bytes per key and a `fewer`th of the programs."""
    mixed = None if tile.mixed is None else tile.mixed * width / fewer
    return replace(tile, key=tile.key * width / fewer, mixed=mixed, programs=tile.programs // fewer)


def cost_models(device: torch.device, geometry: Geometry) -> tuple[CostModel, ...]:
    """Return the cost models of our kernels for layers of this shape.

    They are calibrated on `device`, or shipped for a device of its name, or else shipped for the first known device. If
    PyTorch computes such layers, returns the default `CostModel`.
    """
    if not geometry.supported:
        return (CostModel(),)
    known = _known(name := _name(device))
    calibration = known.get(name, next(iter(known.values())))
    return calibration.cost_models(geometry, wide=_takes_wide(device, geometry)) or (CostModel(),)


def _takes_wide(device: torch.device, geometry: Geometry) -> bool:
    if device.type != "cuda":
        return False
    from radixgen.kernels.chip import Chip
    from radixgen.kernels.triton_backend import takes_wide

    return takes_wide(geometry, Chip.of(device))


def flash_cost(device: torch.device, geometry: Geometry) -> FlashCost | None:
    """Return the flash-attn package's cost for layers of this shape; None if it was not measured on the device."""
    calibration = _known(name := _name(device)).get(name)
    if calibration is None or calibration.flash is None:
        return None
    return calibration.flash.scaled(geometry)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _known(name: str) -> dict[str, Calibration]:
    """Return the shipped calibrations and the stored one for a device of this name, by name."""
    return {entry.device: entry for entry in [*_read(_SHIPPED), *_read_kept(name)]}


def keep(calibration: Calibration) -> Path:
    """Store a calibration in the cache directory, where `cost_models` finds it."""
    path = _kept(calibration.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(calibration)], indent=1))
    return path


def _kept(name: str) -> Path:
    return cache_dir() / "calibration" / f"{name.replace(' ', '-').replace('/', '-')}.json"


def _read_kept(name: str) -> list[Calibration]:
    """Return what `keep` stored, if anything. Logs a warning about a file that cannot be read."""
    try:
        path = _kept(name)
    except FileNotFoundError:
        return []
    try:
        return _read(path) if path.is_file() else []
    except (OSError, ValueError, TypeError, LookupError) as error:
        logger.warning("%s is not a calibration: %r; remove it or recalibrate", path, error)
        return []


def _read(path: Path) -> list[Calibration]:
    return [
        Calibration(
            **entry
            | {
                "tiles": tuple(TileCost(**tile) for tile in entry["tiles"]),
                "quantized_tiles": tuple(TileCost(**tile) for tile in entry.get("quantized_tiles", ())),
                "flash": FlashCost(**entry["flash"]) if entry.get("flash") else None,
            }
        )
        for entry in json.loads(path.read_text())
    ]


def calibrate(device: torch.device, time_us: Callable[[Callable[[], object]], float]) -> Calibration:
    """Measure `device`, in a few seconds. `time_us`: the median microseconds of a call, without launch overhead."""
    from radixgen.kernels.chip import Chip
    from radixgen.kernels.triton_backend import choose_launch, takes_wide

    def tiles(kv_dtype: torch.dtype | None) -> tuple[TileCost, ...]:
        timer = _AttentionTimer(device, time_us, kv_dtype)
        geometry = Geometry(_KV_HEADS, _GROUP, 128, 128, torch.bfloat16, kv_dtype)
        launch = choose_launch(geometry, 128 if takes_wide(geometry, chip) else 64, chip)
        return tuple(timer.tile(tile_class.rows, tile_class.programs) for tile_class in launch.classes)

    measure, chip = _AttentionTimer(device, time_us), Chip.of(device)
    return Calibration(
        device=torch.cuda.get_device_name(device),
        tiles=tiles(None),
        quantized_tiles=tiles(torch.int8),
        partial=measure.partial(),
        first_key=measure.tiles(nodes=64, rows=1, keys=4096, tile=16) / (64 * 4096 * _KV_HEADS),
        launch=measure.launch(),
        merge=measure.merge(),
    )


class _AttentionTimer:
    """Times attention over synthetic trees."""

    def __init__(
        self,
        device: torch.device,
        time_us: Callable[[Callable[[], object]], float],
        kv_dtype: torch.dtype | None = None,
    ) -> None:
        """`kv_dtype`: an 8-bit dtype of keys and values; None for that of queries."""
        self.device = device
        self.time_us = time_us
        self.kv_dtype = kv_dtype or torch.bfloat16

    def tile(self, rows: int, programs: int) -> TileCost:
        """Measure the cost of a unit and of a key of both kinds, in tiles of `rows` rows.

        Each is the slope between two sizes that keep all programs busy and fit into the cache.
        """
        per_tile = rows // _GROUP
        many = 16 * programs // _KV_HEADS
        short = {n: self.tiles(nodes=n, rows=per_tile, keys=16, tile=rows) for n in (many // 2, many)}
        unit = (short[many] - short[many // 2]) * programs / (many - many // 2) / _KV_HEADS
        tall = 4 * programs // _KV_HEADS
        long = {n: self.tiles(1, per_tile * tall, n, tile=rows) for n in (4096, 8192)}
        key = (long[8192] - long[4096]) * programs / 4096 / tall / _KV_HEADS
        units = programs // _KV_HEADS
        leaves = {n: self.mixed(units * per_tile, n // per_tile, tile=rows) for n in (128, 256)}
        mixed = (leaves[256] - leaves[128]) * programs / units / _KV_HEADS / 128
        return TileCost(rows, max(unit - 16 * max(key, mixed), 0.0), key, max(mixed, key), programs)

    def tiles(self, nodes: int, rows: int, keys: int, tile: int) -> float:
        """Time nodes of `keys` keys, side by side, with `rows` rows each, in tiles of one class."""
        parents, lengths = np.full(nodes, -1), np.full(nodes, keys)
        return self._time(parents, lengths, np.repeat(np.arange(nodes), rows), "unshared", tile)

    def mixed(self, leaves: int, keys: int, tile: int) -> float:
        """Time leaves of `keys` keys with one row each, as many per tile as fit."""
        return self._time(np.full(leaves, -1), np.full(leaves, keys), np.arange(leaves), "auto", tile)

    def partial(self) -> float:
        """Measure the cost of one query head's row of a partial result: the same keys in one node, and in a chain of
        nine units.
        """
        rows = 1024
        taken = []
        for depth in (2, 9):
            # One row per node, because a chain without rows counts as one node.
            standing = np.concatenate([np.arange(depth - 1), np.full(rows, depth - 1)])
            parents, keys = np.arange(-1, depth - 1), np.full(depth, 64)
            apart = self._time(parents, keys, standing, "naive", 64)
            taken.append(apart - self._time(parents, keys, standing, "unshared", 64))
        return max(taken[1] - taken[0], 0.0) / (rows * _GROUP * _KV_HEADS * 7)

    def launch(self) -> float:
        """Measure the cost of a launch for tiles of 16 rows in addition to one for tiles of 64."""
        keys, rows = np.full(2, 64), np.repeat([0, 1], [64 // _GROUP, 1])
        both = self._time(np.full(2, -1), keys, rows, "unshared", 16, 64)
        return max(both - self._time(np.full(2, -1), keys, rows[:-1], "unshared", 64), 0.0)

    def merge(self) -> float:
        """Measure the cost of the merge launch: one row over two short nodes as two concurrent units, and as one."""
        row, keys = np.array([0]), np.full(2, 64)
        both = self._time(np.array([-1, 0]), keys, np.array([0, 1]), "naive", 16)
        return max(both - self._time(np.array([-1]), keys[:1], row, "unshared", 16), 0.0)

    def _time(
        self,
        parents: NDArray[np.int64],
        lengths: NDArray[np.int64],
        rows: NDArray[np.int64],
        mode: PlanMode,
        *classes: int,
    ) -> float:
        starts = np.zeros_like(lengths)
        for node, parent in enumerate(parents.tolist()):
            if parent >= 0:
                starts[node] = starts[parent] + lengths[parent]
        ends = np.cumsum(lengths)
        above, positions, keys = _narrow(parents, starts, lengths)
        forest = Forest(above, positions, keys, np.arange(parents.size + 1), ends - lengths, keys)
        # The high unit cost minimizes the number of units.
        tiles = tuple(TileCost(most, 1e6, 1e-6) for most in classes)
        cost = CostModel(tiles=tiles, partial=1e9, group=_GROUP, mix=mode == "auto")
        nodes, last = _narrow(rows, (starts + lengths - 1)[rows])
        made = plan(forest, nodes, last, mode=mode, cost=cost)
        attention = backend("triton", self.device).attention(made, None, self.device)
        q = torch.randn(rows.size, _KV_HEADS * _GROUP, 128, device=self.device, dtype=torch.bfloat16)
        slots = torch.arange(int(ends[-1]), device=self.device)
        k, v = (allocate(slots.numel(), _KV_HEADS, 128, self.kv_dtype, self.device) for _ in range(2))
        for pool in (k, v):
            write(pool, slots, torch.randn(pool.shape, device=self.device, dtype=torch.bfloat16))
        return self.time_us(lambda: attention(q, k, v, 128**-0.5))


def _narrow(*arrays: NDArray[np.int64]) -> list[NDArray[np.int32]]:
    return [array.astype(np.int32) for array in arrays]
