"""Availability of Gluon, Triton's lower-level language, in the version that our kernels are written for."""

VERSION = "3.6."
"""Prefix of the supported Triton version. Gluon changes with every version."""


def supported() -> bool:
    """Return whether that version of Triton is installed."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.__version__.startswith(VERSION))
