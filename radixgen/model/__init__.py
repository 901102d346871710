"""transformers' models on packed rows.

loader   a name -> transformers' model and tokenizer
smollm2  the embedded default model; manifest: whether its files are still what was written
packed   the model with its attention handed to us; what cannot work is refused
runner   a plan and its rows -> logits
"""
