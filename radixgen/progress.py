"""What the terminal shows while something takes longer than a second."""

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
    """A spinner with the seconds that passed; call what it yields with what is going on."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=None)

        def say(text: str) -> None:
            progress.update(task, description=escape(text))
            if not console.is_terminal:
                console.print(text, markup=False)

        yield say


def announce_loading(say: Say, model: str | Path) -> None:
    """Fetch the embedded model if that is the one and it is not here yet; then say that it loads."""
    if model == smollm2.NAME:
        smollm2.fetch(say)
    say(f"loading {model}")
