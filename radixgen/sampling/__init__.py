"""From logits to tokens, and to what may come next.

sampler              draws a token for each sequence, with counter-based randomness
structured           grammars by llguidance; json_numbers: bounds of numbers; grammar_budget: their time per step
beam_search          which beams go on, and which hypotheses are kept
"""
