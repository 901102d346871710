"""`beam`: the likeliest continuations of a prompt, by beam search on the tree."""

from typing import TYPE_CHECKING, Any

from radixgen.core import BeamSearchParams, CompletionOutput

if TYPE_CHECKING:
    from radixgen.async_engine import AsyncEngine
    from radixgen.engine import Engine
    from radixgen.input_processor import Prompt


def beam(engine: "Engine", prompt: "Prompt", width: int, **options: Any) -> list[CompletionOutput]:
    """`width` hypotheses, best first; the options are those of `BeamSearchParams`. Raises `InvalidRequest`."""
    (output,) = engine.beam_search(prompt, BeamSearchParams(beam_width=width, **options))
    return output.outputs


async def beam_async(engine: "AsyncEngine", prompt: "Prompt", width: int, **options: Any) -> list[CompletionOutput]:
    """As `beam`, for coroutines."""
    (output,) = await engine.beam_search(prompt, BeamSearchParams(beam_width=width, **options))
    return output.outputs
