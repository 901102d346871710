"""Which kernels written in Gluon, Triton's lower language, can be used: it changes from version to version."""


def usable() -> bool:
    """Whether a Triton is installed that compiles ours."""
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.__version__.startswith("3.6."))
