"""`beam`: the likeliest completions of a prompt, by beam search on the radix tree."""

from typing import TYPE_CHECKING, Any

from radixgen.core import BeamSearchParams, CompletionOutput

if TYPE_CHECKING:
    from radixgen.engine.async_engine import AsyncEngine
    from radixgen.engine.engine import Engine
    from radixgen.engine.input_processor import Prompt


def beam(engine: "Engine", prompt: "Prompt", width: int, **options: Any) -> list[CompletionOutput]:
    """Beam search that returns `width` completions, the best first. Raises `InvalidRequest`.

    options: those of `BeamSearchParams`.
    """
    (output,) = engine.beam_search(prompt, BeamSearchParams(beam_width=width, **options))
    return output.outputs


async def beam_async(engine: "AsyncEngine", prompt: "Prompt", width: int, **options: Any) -> list[CompletionOutput]:
    """`beam` for coroutines."""
    (output,) = await engine.beam_search(prompt, BeamSearchParams(beam_width=width, **options))
    return output.outputs
