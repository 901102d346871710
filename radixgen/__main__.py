"""`python -m radixgen`."""

from radixgen.cli import app

app()
