"""Trees of thoughts: search over what a model proposes and judges, and the pick of many answers.

`strategies` says in which order a tree grows, `asks` what the model is asked, `search` and `sample` do it, `result` is
what comes of it and goes to JSON, `draw` shows it, and `server` is all that is needed of an engine.
"""

from radixgen.thoughts.asks import Choose, Evaluate, Propose
from radixgen.thoughts.beam import beam, beam_async
from radixgen.thoughts.budget import Budget, Ended
from radixgen.thoughts.draw import picture, svg
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
    "Ended",
    "Evaluate",
    "MonteCarlo",
    "Propose",
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
