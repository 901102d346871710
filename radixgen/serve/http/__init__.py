"""OpenAI's HTTP API: `app.create_app` makes the application, and `radixgen.serve.server.serve` runs it."""
