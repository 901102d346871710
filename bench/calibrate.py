"""Measure this GPU's cost model and keep it where the planner finds it.

    python -m bench.calibrate [--save]

Prints what a unit, a key, a partial row, a key's first read and a further launch cost, in microseconds of one of
the programs that run at the same time, and keeps them in the cache directory by the device's name. With --save they are
also kept under `bench/results/`. The limit is a key's bytes over the measured read bandwidth, shared by all programs.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from bench.device import Timer
from bench.report import Report, benchmark_options
from radixgen.calibration import calibrate, keep


def main(arguments: Sequence[str] | None = None) -> int:
    options = benchmark_options(__doc__).parse_args(arguments)
    report = Report("calibration")
    if not torch.cuda.is_available():
        report.say("no CUDA device: nothing to calibrate")
        return 0
    device = torch.device("cuda")
    timer = Timer(device)
    ceilings = timer.ceilings()
    found = calibrate(device, timer.warm_us)
    report.say(f"limit: {ceilings.describe()}; a key's first read {1e6 * 512 / ceilings.read:.6f} us")
    for what, tile in [("16-bit", tile) for tile in found.tiles] + [("8-bit", tile) for tile in found.quantized_tiles]:
        report.say(
            f"{what} keys, {tile.programs} programs, tile of {tile.rows:3d} rows: {tile.unit:.3f} us a unit, "
            f"{tile.key:.4f} us a key from the cache, {tile.mixed:.4f} where only some rows see it"
        )
    report.say(
        f"first read {found.first_key:.6f} us a key, partial {found.partial:.6f} us a row, "
        f"each further launch {found.launch:.2f} us, merge {found.merge:.2f} us"
    )
    report.say(f"kept in {keep(found)}")
    report.keep(**asdict(found), read=ceilings.read, copy=ceilings.copy, matrix=ceilings.matrix)
    return report.finish(check=options.check, save=options.save)


if __name__ == "__main__":
    sys.exit(main())
