"""`radixgen demo`."""

from radixgen.cli.errors import report_errors
from radixgen.cli.options import DEFAULT_MODEL, MaxTokens, Model


def demo(
    model: Model = DEFAULT_MODEL,
    max_tokens: MaxTokens = 40,
) -> None:
    """Run a burst of overlapping requests and show what prefix sharing saved."""
    from radixgen.demo import run

    with report_errors():
        run(model, max_tokens)
