"""Numba compilation of loops over arrays, with plain Python as the fallback."""

from collections.abc import Callable
from typing import TypeVar

try:
    from numba import njit
except ImportError:
    njit = None

HAS_NUMBA = njit is not None
"""Whether anything is compiled."""

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """Compile `function` with Numba on its first call, cached on disk. Without Numba, return it unchanged.

    The plain version is `function.py_func`.
    """
    if njit is None:
        return function
    result: Function = njit(cache=True, error_model="numpy")(function)
    return result


def compiled_fast(function: Function) -> Function:
    """As `compiled`, but floating-point sums may be computed in any order, and nothing may be infinite or NaN."""
    if njit is None:
        return function
    result: Function = njit(cache=True, error_model="numpy", fastmath=True)(function)
    return result


def inlined(function: Function) -> Function:
    """As `compiled`, but inlined into the compiled caller: passing a dozen arrays costs more than most of the work on
    them.
    """
    if njit is None:
        return function
    result: Function = njit(cache=True, error_model="numpy", inline="always")(function)
    return result
