"""What `echo` asks for: the prompt before each of its choices."""

from dataclasses import dataclass

from radixgen.core import RequestOutput
from radixgen.serve.http.logprobs import TokenTexts, completion_logprobs, join
from radixgen.serve.http.protocol import CompletionChoice, CompletionLogprobs


@dataclass(slots=True)
class Echo:
    """One prompt. Its log-probabilities come no later than its first choice's first token."""

    text: str
    tokens: list[int]
    logprobs: CompletionLogprobs | None = None

    def tells(self, output: RequestOutput) -> bool:
        """Whether it has the prompt's log-probabilities, and they are news."""
        return self.logprobs is None and output.prompt_logprobs is not None

    def read(self, output: RequestOutput, texts: TokenTexts) -> None:
        """Take them. It may take a while."""
        assert output.prompt_logprobs is not None
        self.logprobs = completion_logprobs(self.tokens, output.prompt_logprobs, texts, 0)

    def begin(self, choice: CompletionChoice) -> None:
        """Put the prompt before what is first told of a choice."""
        choice.text = self.text + choice.text
        if self.logprobs is not None:
            choice.logprobs = join(join(None, self.logprobs), choice.logprobs)
