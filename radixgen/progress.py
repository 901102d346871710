"""Progress display in the terminal while a model is loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from radixgen.model import smollm2

Say = Callable[[str], None]


@contextmanager
def waiting(console: Console) -> Iterator[Say]:
    """Show a spinner with the elapsed time; yields a function that sets its text."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def say(text: str) -> None:
            progress.update(task, description=escape(text))
            if not console.is_terminal:
                console.print(text, markup=False)

        yield say


def announce_loading(say: Say, model: str | Path) -> None:
    """Announce that a model is loaded; download the embedded model first if necessary."""
    if model == smollm2.NAME:
        smollm2.fetch(say)
    say(f"loading {model}")
