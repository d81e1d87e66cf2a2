"""The tests of the servers that are to take a checkpoint, and what became of it before each, looked up once."""

from collections.abc import Collection, Mapping
from functools import cached_property

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.judging.served import Asked, Base, base_at_hand
from pytest_nullspace.judging.serving import Outcome, hold
from pytest_nullspace.judging.verdicts import Tier
from pytest_nullspace.settings import Settings


class Servers:
    """The servers that one run is held against."""

    def __init__(self, settings: Settings, checkpoint: Checkpoint | None = None) -> None:
        """Of a checkpoint each that was asked for; a saved run, which has none, has no server."""
        self._checkpoint, self._named = checkpoint, settings.base
        self._asked = () if checkpoint is None else settings.serve
        self._outcomes: dict[str, Outcome] = {}

    @cached_property
    def tests(self) -> Mapping[str, Asked]:
        """The tests by name; where a server is asked for once, its version is not in it."""
        names = [asked.server for asked in self._asked]
        return {f"serve[{asked.server if names.count(asked.server) == 1 else asked}]": asked for asked in self._asked}

    @cached_property
    def _base(self) -> Base | None:
        assert self._checkpoint is not None
        return base_at_hand(self._checkpoint, self._named)

    def outcome(self, test: str) -> Outcome:
        """What the rules of a test's server find.

        Raises:
            CheckpointError: A file that a rule reads cannot be read.
        """
        if test not in self._outcomes:
            assert self._checkpoint is not None
            self._outcomes[test] = hold(self.tests[test], self._checkpoint, self._base)
        return self._outcomes[test]

    def failed(self) -> dict[str, str]:
        """The tests that fail, each with what it says."""
        return {test: self.outcome(test).summary for test in self.tests if self.outcome(test).tier is Tier.FAIL}

    def doubts(self, judged: Collection[str] | None) -> list[str]:
        """What the tests that came to a verdict warn of."""
        gated = [test for test in self.tests if judged is None or test in judged]
        return [self.outcome(test).summary for test in gated if self.outcome(test).tier is Tier.WARN]
