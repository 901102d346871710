"""What `echo` asks for: the prompt before each of its choices."""

from dataclasses import dataclass

from radixgen.core import RequestOutput
from radixgen.serve.http.logprobs import TokenTexts, completion_logprobs, join
from radixgen.serve.http.protocol import CompletionChoice, CompletionLogprobs


@dataclass(slots=True)
class Echo:
    """One prompt. `count`: likeliest tokens at each of its places; None: no log-probabilities."""

    text: str
    tokens: list[int]
    count: int | None
    logprobs: CompletionLogprobs | None = None

    def read(self, output: RequestOutput, texts: TokenTexts) -> None:
        """Take the log-probabilities from the output that tells them: one no later than the first token's."""
        if self.count is not None and self.logprobs is None and output.prompt_logprobs is not None:
            self.logprobs = completion_logprobs(self.tokens, output.prompt_logprobs, self.count, texts, 0)

    def begin(self, choice: CompletionChoice) -> None:
        """Put the prompt before what is first told of a choice."""
        choice.text = self.text + choice.text
        if self.logprobs is not None:
            choice.logprobs = join(join(None, self.logprobs), choice.logprobs)
