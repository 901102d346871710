"""The short profile of `churn.py`: random histories of the whole engine against the token-stamp oracle."""

from churn import EngineMachine
from hypothesis import settings

TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=60, stateful_step_count=50, deadline=None)
