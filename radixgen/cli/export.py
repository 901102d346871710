"""`radixgen export`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from radixgen.cli.errors import report_errors, require_extra
from radixgen.cli.options import MaxModelLen
from radixgen.core import InvalidRequest
from radixgen.progress import waiting


def export(
    model: Annotated[str, typer.Argument(help="Model: smollm2, a directory, a .gguf file or a hub id.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", file_okay=False, help="Empty or new directory to write.")],
    file_format: Annotated[str, typer.Option("--format", help="Format of the file: onnx.")] = "onnx",
    weights: Annotated[str, typer.Option(help="Data type of the weights: float32 or int8.")] = "float32",
    max_model_len: MaxModelLen = None,
) -> None:
    """Write a step of a model to DIR, for onnxruntime and compilers; serve it with --model DIR."""
    with report_errors():
        if file_format != "onnx":
            raise InvalidRequest("format", file_format, "must be onnx")
        require_extra("onnx", "onnx", "onnxruntime", "onnxscript")

        from radixgen.model.onnx_export import export_onnx

        with waiting(Console(stderr=True)) as say:
            say(f"exporting {model}, which takes minutes")
            step = export_onnx(model, folder, weights=weights, max_model_len=max_model_len)
        bounds = step.bounds
        print(
            f"{folder}: {step.name}, {weights}, up to {step.max_model_len:,} tokens a sequence; a step has at most "
            f"{bounds.rows:,} rows, {bounds.groups} groups of {bounds.units:,} units, and {bounds.keys:,} keys a unit"
        )
