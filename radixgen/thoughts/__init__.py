"""Tree-of-thoughts search, best-of-n sampling and voting, and beam search.

`strategies` defines the order in which a tree grows, `questions` those to the model, `search` and `sample` run them,
`result` is the outcome and its JSON format, `draw` draws it, and `backend` is the interface to engines.
"""

from radixgen.thoughts.beam import beam, beam_async
from radixgen.thoughts.budget import Budget, EndReason
from radixgen.thoughts.picture import picture, svg
from radixgen.thoughts.questions import Choose, Evaluate, Propose
from radixgen.thoughts.remote import RemoteEngine
from radixgen.thoughts.result import Result
from radixgen.thoughts.sample import Sample, Samples, sample, sample_async
from radixgen.thoughts.search import search, search_async
from radixgen.thoughts.strategies import BestFirst, BreadthFirst, DepthFirst, MonteCarlo, Strategy
from radixgen.thoughts.thought import Cost, Step, Thought

__all__ = [
    "BestFirst",
    "BreadthFirst",
    "Budget",
    "Choose",
    "Cost",
    "DepthFirst",
    "EndReason",
    "Evaluate",
    "MonteCarlo",
    "Propose",
    "RemoteEngine",
    "Result",
    "Sample",
    "Samples",
    "Step",
    "Strategy",
    "Thought",
    "beam",
    "beam_async",
    "picture",
    "sample",
    "sample_async",
    "search",
    "search_async",
    "svg",
]
