"""`echo` of completions: the prompt in front of each choice."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from radixgen.serve.http.logprobs import TokenTexts, completion_logprobs, join
from radixgen.serve.http.protocol import CompletionChoice, CompletionLogprobs


@dataclass(slots=True)
class Echo:
    """Text and tokens of a prompt, and its log-probabilities once they are computed."""

    text: str
    tokens: list[int]
    logprobs: CompletionLogprobs | None = None

    def read(self, logprobs: Sequence[Mapping[int, float] | None], texts: TokenTexts) -> None:
        """Convert the engine's log-probabilities of the prompt; slow for long prompts."""
        self.logprobs = completion_logprobs(self.tokens, logprobs, texts, 0)

    def begin(self, choice: CompletionChoice) -> None:
        """Prepend the prompt to the first delta of a choice."""
        choice.text = self.text + choice.text
        if self.logprobs is not None:
            choice.logprobs = join(join(None, self.logprobs), choice.logprobs)
