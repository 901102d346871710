"""Plain loops over arrays, compiled where Numba is installed."""

from collections.abc import Callable
from typing import TypeVar

try:
    from numba import njit
except ImportError:
    njit = None

Function = TypeVar("Function", bound=Callable[..., object])


def compiled(function: Function) -> Function:
    """`function` as machine code, compiled at its first call and kept in Numba's cache; itself without Numba.

    `function.py_func` is the plain twin.
    """
    if njit is None:
        return function
    result: Function = njit(cache=True, error_model="numpy")(function)
    return result


def inlined(function: Function) -> Function:
    """As `compiled`, for a part of compiled loops: its body stands in its caller's place, since handing over a dozen
    arrays costs more than most of what is done with them.
    """
    if njit is None:
        return function
    result: Function = njit(cache=True, error_model="numpy", inline="always")(function)
    return result
