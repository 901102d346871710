"""OpenAI's HTTP interface in front of an engine: `app.create_app` is the application, `server.serve` runs it."""
