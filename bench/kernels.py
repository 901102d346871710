"""What the attention kernel takes of a chip, compiled for it on any machine: no GPU is needed.

    python -m bench.kernels [--save]

One line for each launch that the backend can choose and each chip: registers a thread, spilled bytes, shared memory,
and how many matrix (`HGMMA` on sm_90, `HMMA`), bulk copy (`UTMALDG`) and asynchronous copy (`LDGSTS`) instructions its
machine code holds. The limits are the chip's own: 255 registers a thread, 227 KiB of shared memory on sm_90, 163 on
sm_80.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.report import Report, benchmark_options, track
from radixgen.kernels import triton_kernels
from radixgen.kernels.geometry import Geometry
from radixgen.kernels.triton_backend import Chip, choose_launch, constants
from radixgen.kernels.work import Launch

CHIPS = (80, 90)
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
INSTRUCTIONS = ("HGMMA", "HMMA", "UTMALDG", "LDGSTS")
ALIGNED = [["tt.divisibility", 16]]


def configurations() -> Iterator[tuple[Geometry, Launch, int]]:
    """Every launch of the head shapes that models have, for both chips; bfloat16 stands for float16 too."""
    shapes = [(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)]
    for chip in CHIPS:
        for head_dim, v_head_dim in shapes:
            for group, tile_rows in ((4, 16), (4, 64), (1, 64), (71, 128)):
                geometry = Geometry(8, group, head_dim, v_head_dim, torch.bfloat16)
                if not geometry.supported:
                    continue
                yield geometry, choose_launch(geometry, tile_rows, Chip(chip, 132)), chip


def examine(geometry: Geometry, launch: Launch, chip: int) -> dict[str, Any]:
    """Compile one configuration and read its machine code."""
    fixed = constants(geometry, launch, window=False, softcap=False, sinks=False)
    names = triton_kernels.attend.arg_names
    types = {name: "constexpr" if name in fixed else _type(name, geometry, launch) for name in names}
    aligned = {(place,): ALIGNED for place, name in enumerate(names) if str(types[name]).startswith("*")}
    source = ASTSource(triton_kernels.attend, types, fixed, aligned)
    options = {"num_warps": launch.num_warps}
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
    usage, code = _dump(compiled.asm["cubin"])
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "chip": chip, "head_dim": geometry.head_dim, "v_head_dim": geometry.v_head_dim, "group": geometry.group,
        "tiles": launch.tiles, "warps": launch.num_warps, "registers": int(registers), "spilled": int(stack),
        "shared": compiled.metadata.shared, **{name: len(re.findall(rf"\b{name}", code)) for name in INSTRUCTIONS},
    }  # fmt: skip


def _type(name: str, geometry: Geometry, launch: Launch) -> str:
    dtype = NAMES[geometry.dtype]
    if name in ("k_blocks", "v_blocks") and launch.least_run:
        return f"tensordesc<{dtype}[{launch.block_keys}, {geometry.padded[name == 'v_blocks']}]>"
    if name in ("q", "k", "v", "k_blocks", "v_blocks", "out"):
        return f"*{dtype}"
    if name in ("scale", "softcap", "window"):
        return "i32" if name == "window" else "fp32"
    return "*fp32" if name in ("lse", "partial_out", "partial_lse", "sinks") else "*i32"


def _dump(cubin: bytes) -> tuple[str, str]:
    """What `cuobjdump` says of a cubin's resources, and its disassembly."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    return usage, code


def main(arguments: Sequence[str] | None = None) -> int:
    parser = benchmark_options(__doc__)
    parser.add_argument("--first", type=int, help="only so many of the configurations")
    options = parser.parse_args(arguments)
    report = Report("kernels")
    found = []
    for geometry, launch, chip in track(list(configurations())[: options.first], "compiling"):
        found.append(one := examine(geometry, launch, chip))
        report.say(
            f"sm_{chip} {one['head_dim']:3d}/{one['v_head_dim']:3d} group {one['group']:2d} tiles {one['tiles']!s:14s} "
            f"{one['warps']} warps: {one['registers']} registers, {one['spilled']} bytes spilled, "
            f"{one['shared']} shared; " + ", ".join(f"{one[name]} {name}" for name in INSTRUCTIONS)
        )
    report.keep(configurations=found)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
