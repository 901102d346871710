"""A worker of the token-stamp oracle in a process of its own: `stamp_worker.py ADDRESS INDEX`."""

import sys

import torch
from oracle import StampModel
from serving import VOCAB

from radixgen import Engine
from radixgen.serve.zmq.sentinel import Sentinel
from radixgen.serve.zmq.worker import Worker, run_until_signalled


def main() -> None:
    torch.set_num_threads(1)
    engine = Engine(StampModel(VOCAB, 4096), kv_tokens=16_384)
    with Sentinel() as sentinel:
        index = int(sys.argv[2])
        worker = Worker(engine, [sys.argv[1]], engine_index=index, drain_timeout=60, sentinel=sentinel)
        drained = run_until_signalled(worker)
    sys.exit(0 if drained else 1)


if __name__ == "__main__":
    main()
