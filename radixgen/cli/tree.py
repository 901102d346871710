"""`radixgen tree`."""

from rich.console import Console

from radixgen.cli.errors import report_errors
from radixgen.cli.options import DEFAULT_MODEL, Model, PromptFile
from radixgen.cli.prompts import read_requests
from radixgen.core import InvalidRequest


def tree(
    file: PromptFile = None,
    model: Model = DEFAULT_MODEL,
) -> None:
    """Draw the radix tree of a list of prompts; loads the tokenizer only.

    A line of FILE or of standard input is plain text, or a JSON object with "prompt" (text or token ids) or
    "messages" (and optionally "tools").
    """
    from radixgen.cache import ExtentPool, RadixTree
    from radixgen.engine.input_processor import chat_tokens
    from radixgen.model.loader import load_tokenizer
    from radixgen.tree_view import picture, snapshot

    with report_errors():
        tokenizer = load_tokenizer(model)
        if tokenizer is None:
            raise InvalidRequest("model", model, "has no tokenizer")
        radix = RadixTree(ExtentPool(1))
        submitted = 0
        locks = []
        for request in read_requests(None, file):
            if "messages" in request:
                tokens = chat_tokens(tokenizer, request["messages"], request.get("tools"))
            else:
                prompt = request["prompt"]
                tokens = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt
            submitted += len(tokens)
            locks.append(radix.insert(tokens))
        console = Console()
        console.print(picture(snapshot(radix, tokenizer.decode)))
        distinct = sum(node.known for node in radix.nodes())
        console.print(
            f"{len(locks)} prompts, {submitted} tokens, {distinct} distinct, "
            f"{radix.num_nodes} nodes: {submitted / max(distinct, 1):.2f}× shared"
        )
