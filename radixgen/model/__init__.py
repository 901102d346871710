"""Run transformers' models on packed rows.

loader      a name -> transformers' model and tokenizer
smollm2     the embedded default model; manifest: checksums of its files
packed      the model with its attention replaced, and checks that this is exact
runner      a plan and its rows -> logits; graphs: captured steps
parallel    a model sharded over processes; ranks, lockstep, ring: how they communicate
"""
