"""How commands fail: radixgen's own errors in one line, without a traceback."""

from importlib.util import find_spec

import typer
from rich.console import Console
from rich.text import Text

from radixgen.core import RadixgenError


class report_errors:  # noqa: N801
    """Context manager that prints a `RadixgenError` in one line and exits with status 1."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, RadixgenError):
            line = Text.assemble((type(error).__name__, "red"), " ", " ".join(str(error).split()))
            Console(stderr=True).print(line, soft_wrap=True)
            raise typer.Exit(1) from error


def require_extra(extra: str, *modules: str) -> None:
    """Raise `RadixgenError` if a module of this extra is not installed."""
    missing = [module for module in modules if find_spec(module) is None]
    if missing:
        raise RadixgenError(f"{', '.join(missing)} not installed: pip install 'radixgen[{extra}]'")
