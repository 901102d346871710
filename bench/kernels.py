"""What the kernels take of a chip, compiled for it on any machine: no GPU is needed.

    python -m bench.kernels [--disassemble CHIP ...] [--save]

One line for each launch of `triton_kernels.attend` that the backend can choose, plain and with the masks that models
have, for each other kernel of that module, and for each chip: registers a thread, spilled bytes, shared memory, and how
many matrix (`HGMMA` on sm_90, `HMMA`), bulk copy (`UTMALDG`) and asynchronous copy (`LDGSTS`) instructions its machine
code holds. The limits are the chip's own: 255 registers a thread, 227 KiB of shared memory on sm_90, 163 on sm_80.
"""

import itertools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.report import Report, benchmark_options, track
from radixgen.kernels import block_kernels, triton_kernels
from radixgen.kernels.all_reduce_kernels import all_reduce_kernel
from radixgen.kernels.chip import Chip
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.triton_backend import choose_launch, constants
from radixgen.kernels.triton_blocks import attending, choose_warps, choosing, score_warps, scoring
from radixgen.kernels.work import Launch, TileClass

CHIPS = (80, 90)
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
NAMES |= {torch.int8: "i16", torch.float8_e4m3fn: "u16"}  # in pairs
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")
MASKS: dict[int, tuple[str, ...]] = {64: ("window", "sinks"), 128: ("window", "softcap"), 256: ("window", "softcap")}
"""Of models with such heads, like gpt-oss and gemma 2"""
ALIGNED = [["tt.divisibility", 16]]


def configurations() -> Iterator[tuple[Geometry, Launch, int, int, tuple[str, ...]]]:
    """Every launch of the head shapes that models have, and each class of tiles in it, for both chips, without masks
    and with those that models with such heads have, some with keys in 8 bits, and one of a single KV head; bfloat16
    stands for float16 too.
    """
    shapes = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
    tiles = [(4, 16, 1), (4, 64, 64), (1, 64, 64), (71, 128, 64)]
    for chip, (head_dim, v_head_dim), (group, tile_rows, rows) in product(CHIPS, shapes, tiles):
        geometry = Geometry(8, group, head_dim, v_head_dim, torch.bfloat16)
        if not geometry.supported:
            continue
        for masks in dict.fromkeys([(), MASKS.get(head_dim, ())]):
            launch = choose_launch(geometry, tile_rows, Chip(chip, 132), rows=rows, windowed="window" in masks)
            for kind in range(len(launch.classes)):
                yield geometry, launch, kind, chip, masks
    for kv_dtype, dim, (group, tile_rows, rows) in product((torch.int8, torch.float8_e4m3fn), (64, 128), tiles[:2]):
        geometry = Geometry(8, group, dim, dim, torch.bfloat16, kv_dtype)
        launch = choose_launch(geometry, tile_rows, Chip(90, 132), rows=rows)
        for kind in range(len(launch.classes)):
            yield geometry, launch, kind, 90, ()
    alone = Geometry(1, 16, 128, 128, torch.bfloat16)
    for chip in CHIPS:
        yield alone, choose_launch(alone, 16, Chip(chip, 132), rows=4), 0, chip, ()


def examine(
    geometry: Geometry, launch: Launch, kind: int, chip: int, masks: tuple[str, ...], *, disassemble: bool = True
) -> dict[str, Any]:
    """Compile one configuration of the attention kernel and read what it takes; instructions of machine code that is
    disassembled, which takes longer than all else.
    """
    shape = launch.classes[kind]
    fixed = constants(geometry, launch, kind, **{name: name in masks for name in ("window", "softcap", "sinks")})
    types = {
        name: _type(name, geometry, shape, launch.least_run > 0)
        for name in triton_kernels.attend.arg_names
        if name not in fixed
    }
    return {
        "kernel": "attend", "chip": chip, "head_dim": geometry.head_dim, "v_head_dim": geometry.v_head_dim,
        "group": geometry.group, "kv_dtype": str(geometry.kv_dtype), "masks": masks, "tiles": shape.rows,
        "warps": shape.num_warps,
        **_compiled(triton_kernels.attend, types, fixed, shape.num_warps, chip, shape.registers, disassemble),
    }  # fmt: skip


def others(head_dim: int, chip: int) -> Iterator[dict[str, Any]]:
    """The remaining kernels, for 32 query heads of 8 KV heads; merging in its narrowest and widest form."""
    pool = {"k": "*bf16", "v": "*bf16", "key": "*bf16", "value": "*bf16", "out": "*bf16", "slots": "*i64"}
    floats = dict.fromkeys(("partial_out", "partial_lse", "lse", "sinks", "k_scales", "v_scales"), "*fp32")
    strides = dict.fromkeys(("key_row", "key_head", "value_row", "value_head", "rows", "num_slots"), "i32")
    dims = {"HEAD_DIM": head_dim, "V_HEAD_DIM": head_dim}
    merging = {"Q_HEADS": 32, "V_HEAD_DIM": head_dim, "PADDED_V_DIM": triton.next_power_of_2(head_dim), "SINKS": True}
    padded = triton.next_power_of_2(head_dim)
    writing = {
        "KV_HEADS": 8, **dims, "PADDED_HEADS": 8, "PADDED_DIM": padded, "PADDED_V_DIM": padded, "LARGEST": 127.0,
        "PDL": chip >= 90,
    }  # fmt: skip
    summed = {"data": "*bf16", "parts": "*fp32", "count": "i32"}
    pool |= summed | dict.fromkeys(("rooms", "flags", "rounds"), "*i64")
    ranks = {"RANK": 1, "SIZE": 2, "BLOCK": 2048, "ROOM": 8192, "PARTS": 4, "LOOKS": 1 << 18, "PDL": chip >= 90}
    for kernel, fixed in (
        (triton_kernels.expand_keys, {"BLOCK": 128, "ROWS": 128}),
        (triton_kernels.write_kv, writing | {"QUANTIZED": False}),
        (triton_kernels.write_kv, writing | {"QUANTIZED": True}),
        (triton_kernels.merge, merging | {"BLOCK_HEADS": 16, "BLOCK_PARTIALS": 1, "PDL": chip >= 90}),
        (triton_kernels.merge, merging | {"BLOCK_HEADS": 1, "BLOCK_PARTIALS": 64, "PDL": chip >= 90}),
        (all_reduce_kernel, ranks),
    ):
        known = pool | floats | strides
        if fixed.get("QUANTIZED"):
            known |= {"k": "*i8", "v": "*i8"}
        if kernel is triton_kernels.merge:
            known["rows"] = "*i32"
        types = {name: known.get(name, "*i32") for name in kernel.arg_names if name not in fixed}
        name = kernel.fn.__name__
        yield {
            "kernel": name,
            "chip": chip,
            "head_dim": head_dim,
            **_compiled(kernel, types, fixed, 4, chip, disassemble=False),
        }


def of_blocks(head_dim: int, rows: int, chip: int) -> Iterator[dict[str, Any]]:
    """The kernels that choose blocks and attend to them, for 32 query heads of 8 KV heads and units of `rows` rows."""
    geometry = Geometry(8, 4, head_dim, head_dim, torch.bfloat16)
    launch = choose_launch(geometry, 64, Chip(chip, 132), rows=rows, block_rows=min(rows, 2))
    shape = launch.blocks
    assert shape is not None
    heads = scoring(geometry, shape, softcap=False, overlap=launch.overlap)
    types = dict.fromkeys(("q", "bounds", "k", "v"), "*bf16")
    types |= dict.fromkeys(("chunk_lse", "weights", "partial_out", "partial_lse", "k_scales", "v_scales"), "*fp32")
    types |= {"scale": "fp32", "softcap": "fp32", "num_slots": "i32"}
    types |= {name: _type(name, geometry, shape, launch.least_run > 0) for name in ("k_blocks", "v_blocks")}
    for kernel, fixed, warps, registers in (
        (block_kernels.sum_scores, heads, score_warps(geometry), None),
        (block_kernels.weigh_blocks, heads | {"MOST_CHUNKS": 8}, score_warps(geometry), None),
        (block_kernels.choose_blocks, choosing(geometry, 512, launch.overlap), choose_warps(8, 512), None),
        (block_kernels.choose_blocks, choosing(geometry, 2048, launch.overlap), choose_warps(8, 2048), None),
        (block_kernels.attend_blocks, attending(geometry, launch, shape, softcap=False), shape.num_warps,
         shape.registers),
    ):  # fmt: skip
        signature = {name: types.get(name, "*i32") for name in kernel.arg_names if name not in fixed}
        found = _compiled(kernel, signature, fixed, warps, chip, registers, disassemble=False)
        yield {"kernel": kernel.fn.__name__, "chip": chip, "head_dim": head_dim, "tiles": shape.rows, **found}


def _compiled(
    kernel: Any,
    types: dict[str, str],
    fixed: dict[str, Any],
    warps: int,
    chip: int,
    registers: int | None = None,
    disassemble: bool = True,
) -> dict[str, Any]:
    """What one kernel's machine code takes and holds; pointers are taken to be aligned."""
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(place,): ALIGNED for place, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel, signature, fixed, aligned)
    options = {"num_warps": warps, "maxnreg": registers}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    dump = _dump(compiled.asm["cubin"], disassemble)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump).groups()  # type: ignore[union-attr]
    found = {"registers": int(registers), "spilled": int(stack), "shared": compiled.metadata.shared}
    if disassemble:
        found |= {name: len(re.findall(rf"\b{name}", dump)) for name in INSTRUCTIONS}
    return found


def _type(name: str, geometry: Geometry, shape: TileClass, bulk: bool) -> str:
    dtype, kv_dtype = NAMES[geometry.dtype], NAMES[geometry.stored_dtype]
    if name in ("k_blocks", "v_blocks") and bulk:
        width = geometry.padded[name == "v_blocks"] // (1 + geometry.quantized)
        return f"tensordesc<{kv_dtype}[{shape.block_keys}, {width}]>"
    if name in ("k", "v", "k_blocks", "v_blocks"):
        return f"*{kv_dtype}"
    if name in ("q", "out"):
        return f"*{dtype}"
    if name in ("scale", "softcap", "window", "num_slots"):
        return "i32" if name in ("window", "num_slots") else "fp32"
    if name == "row_positions":
        return "*i64"
    return "*fp32" if name in ("lse", "partial_out", "partial_lse", "sinks", "k_scales", "v_scales") else "*i32"


def _dump(cubin: bytes, disassemble: bool) -> str:
    """What `cuobjdump` says of a cubin's resources, and its disassembly."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", *(["-sass"] if disassemble else []), file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--first", type=int, help="only so many of the configurations")
    text = "count the instructions of kernels for these chips only"
    parser.add_argument("--disassemble", type=int, nargs="+", metavar="CHIP", default=CHIPS, choices=CHIPS, help=text)
    options = parser.parse_args(arguments)
    report = Report("kernels")
    found = []
    for *one, chip, masks in track(list(configurations())[: options.first], "compiling"):
        found.append(one := examine(*one, chip, masks, disassemble=chip in options.disassemble))
        report.say(
            f"sm_{chip} {one['head_dim']:3d}/{one['v_head_dim']:3d} group {one['group']:2d} tiles of {one['tiles']:3d} "
            f"{'+'.join(masks) or 'plain':14s} "
            f"{one['warps']} warps: {one['registers']} registers, {one['spilled']} bytes spilled, "
            f"{one['shared']} shared; " + ", ".join(f"{one[name]} {name}" for name in INSTRUCTIONS if name in one)
        )
    for chip in CHIPS:
        for head_dim in (64, 128, 256):
            blocks = (one for rows in (1, 64) for one in of_blocks(head_dim, rows, chip))
            for one in itertools.chain(others(head_dim, chip), blocks):
                found.append(one)
                report.say(
                    f"sm_{chip} {one['kernel']:17s} {head_dim:3d}: {one['registers']} registers, "
                    f"{one['spilled']} bytes spilled, {one['shared']} shared"
                )
    report.keep(configurations=found)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
