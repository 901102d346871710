"""Whether our kernels in Gluon, Triton's lower-level language, can be compiled: Gluon changes with every version."""

VERSION = "3.6."
"""How the version of Triton begins that they are written for."""


def supported() -> bool:
    """Whether that version of Triton is installed."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.__version__.startswith(VERSION))
