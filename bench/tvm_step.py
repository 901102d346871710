"""One exported step through TVM: its sizes are fixed, its constants folded, and the rest compiled for LLVM."""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from radixgen import Engine, SamplingParams
from radixgen.core import Plan
from radixgen.model.onnx_model import OnnxModel
from radixgen.model.onnx_step import MODEL_FILE

Arrays = dict[str, NDArray[Any]]


@dataclass
class RecordedStep:
    """The inputs of a step, the pool as it was before it among them, and what onnxruntime made of them."""

    inputs: Arrays
    logits: NDArray[np.float32]
    seconds: float


class _Recorder(OnnxModel):
    """Keeps the last step that has a row for each of `count` sequences, and units in every group."""

    def __init__(self, model: OnnxModel, count: int) -> None:
        self.__dict__.update(model.__dict__)
        self._count = count
        self.step_made: RecordedStep | None = None

    def run(self, plan: Plan, *arguments: Any) -> Any:
        pool = dict(zip(self.step.pool_names(), [array.copy() for array in self._pool], strict=True))
        inputs = self._inputs(plan, *arguments)
        begin = time.perf_counter()
        logits = super().run(plan, *arguments)
        seconds = time.perf_counter() - begin
        if len(logits) == plan.num_rows == self._count and all(array.size for array in inputs.values()):
            self.step_made = RecordedStep(inputs | pool, logits.numpy().copy(), seconds)
        return logits


def record_step(model: OnnxModel, prefix: Iterable[int], endings: Sequence[Sequence[int]]) -> RecordedStep:
    """The last step of decoding a few sequences behind one prefix."""
    recorder = _Recorder(model, len(endings))
    tokens = [[token % model.vocab_size for token in (*prefix, *ending)] for ending in endings]
    with Engine(recorder, kv_tokens=sum(map(len, tokens)) + 100) as engine:
        engine.generate(tokens, SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True))
    assert recorder.step_made is not None
    return recorder.step_made


def compile_step(folder: Path, inputs: Arrays) -> Callable[[], NDArray[np.float32]]:
    """Compile the step in `folder` for the sizes of `inputs`, none of which may be 0. The result runs it on them, and
    returns the logits.
    """
    import onnx_ir
    import tvm
    from onnx_ir.passes import common
    from onnxscript.optimizer import fold_constants
    from tvm import relax
    from tvm.relax.frontend.onnx import from_onnx

    model = onnx_ir.load(folder / MODEL_FILE)
    logits, *pool = model.graph.outputs
    vocab_size = logits.shape[1]
    for node in model.graph:
        for output in node.outputs:
            output.shape = None
    logits.shape = onnx_ir.Shape([inputs["logit_rows"].size, vocab_size])
    for value in (*model.graph.inputs, *pool):
        value.shape = onnx_ir.Shape(inputs[value.name.removeprefix("new_")].shape)
    fold_constants(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedNodesPass()(model)
    onnx_ir.external_data.load_to_model(model)
    machine = relax.VirtualMachine(tvm.compile(from_onnx(onnx_ir.to_proto(model)), target="llvm"), tvm.cpu())
    arguments = [tvm.runtime.tensor(np.ascontiguousarray(inputs[given.name])) for given in model.graph.inputs]

    def run() -> NDArray[np.float32]:
        logits: NDArray[np.float32] = machine["main"](*arguments)[0].numpy()
        return logits

    return run
