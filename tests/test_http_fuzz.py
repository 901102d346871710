"""Schemathesis against the application's own description; tests/http_fuzz.py does it at length."""

import sys
import warnings

import pytest
from served import over_socket, tiny


@pytest.mark.slow
def test_no_request_is_too_odd() -> None:
    """None that fits the description, and none that does not, is answered by 500 or above."""
    if "schemathesis" not in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it imports
            pytest.importorskip("schemathesis")
    from http_fuzz import fuzz

    with over_socket(tiny()) as served:
        found = fuzz(served.url, 160, 0)
    assert not found.failures and sum(found.statuses.values()) >= 160
    assert {200, 400} <= found.statuses.keys() and len(found.by_route) >= 8
