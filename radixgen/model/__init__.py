"""transformers' models on packed rows.

loader   a name -> transformers' model and tokenizer
smollm2  the embedded default model
packed   the model with its attention handed to us; what cannot work is refused
runner   a plan and its rows -> logits
"""
