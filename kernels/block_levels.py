"""Levels by which the weights of blocks are compared: the exponent of a float32 and two more bits."""

LEVELS, LOWEST, LEVEL_SHIFT = 128, 432, 21
"""Level `i` of `LEVELS` is of the numbers whose bits, shifted, are `LOWEST + i`: from 2^-19 to 2^13. Less counts as the
lowest level, and more as the highest.
"""
