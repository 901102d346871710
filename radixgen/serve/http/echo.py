"""What `echo` asks for: the prompt before each of its choices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from radixgen.serve.http.logprobs import TokenTexts, completion_logprobs, join
from radixgen.serve.http.protocol import CompletionChoice, CompletionLogprobs


@dataclass(slots=True)
class Echo:
    """One prompt, and its log-probabilities once they are there."""

    text: str
    tokens: list[int]
    logprobs: CompletionLogprobs | None = None

    def read(self, logprobs: Sequence[Mapping[int, float] | None], texts: TokenTexts) -> None:
        """Take the engine's. It may take a while."""
        self.logprobs = completion_logprobs(self.tokens, logprobs, texts, 0)

    def begin(self, choice: CompletionChoice) -> None:
        """Put the prompt before what is first told of a choice."""
        choice.text = self.text + choice.text
        if self.logprobs is not None:
            choice.logprobs = join(join(None, self.logprobs), choice.logprobs)
