"""`model.generate` of a transformers model, served by an engine."""
