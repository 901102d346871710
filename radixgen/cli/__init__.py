"""The command line: `radixgen demo | generate | chat | serve | worker | tree | explain | export | doctor`."""

import typer

from radixgen.cli import chat, demo, doctor, explain, export, generate, serve, tree, worker
from radixgen.core.settings import wait_without_spinning

app = typer.Typer(no_args_is_help=True, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Serve language models; store, compute and read shared prefixes once."""
    wait_without_spinning()


app.command()(demo.demo)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(serve.serve)
app.command()(tree.tree)
app.command()(explain.explain)
app.command()(export.export)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(worker.worker)
app.command()(doctor.doctor)
