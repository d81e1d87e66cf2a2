"""An adapter held against the rules of a server: what it refuses, what nobody knows, and how it must be started."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from pytest_nullspace.checkpoint import Checkpoint
from pytest_nullspace.judging.served import Asked, Base, Facts, Finding, numbers
from pytest_nullspace.judging.servers import Rule, rules_of
from pytest_nullspace.judging.verdicts import Tier


@dataclass(frozen=True, slots=True)
class Held:
    """One thing that a rule found.

    Attributes:
        rule: Whose.
        finding: What, as the rule judges it.
        tier: How it is judged: what nobody checked for a version is no failure, but no pass either.
    """

    rule: Rule
    finding: Finding
    tier: Tier

    @property
    def words(self) -> str:
        """What was found, and under which rule of which version."""
        return f"rule {self.rule.name}: {self.finding.what}"

    @property
    def source(self) -> str:
        """The server's own rule, and where it is written."""
        return f"{self.rule.server}'s rule: {self.rule.says} ({self.rule.source}; {versions(self.rule)})"


@dataclass(frozen=True)
class Outcome:
    """What became of an adapter before one server.

    Attributes:
        asked: The server.
        rules: How many rules it was held against.
        held: What they found, the weightiest first.
        unchecked: The rules that nobody checked for the version that was told.
    """

    asked: Asked
    rules: int
    held: tuple[Held, ...]
    unchecked: tuple[Rule, ...]

    @property
    def tier(self) -> Tier:
        """Fail for what is refused, warn for what nobody knows."""
        return Tier.worst([*(held.tier for held in self.held), Tier.WARN if self.unchecked else Tier.PASS])

    def of(self, tier: Tier) -> list[Held]:
        """What was found of one tier."""
        return [held for held in self.held if held.tier is tier]

    @property
    def summary(self) -> str:
        """All of it in one line, which names the first thing of the worst tier."""
        if self.tier is Tier.PASS:
            notes = "".join(f"; {held.finding.what}" for held in self.held)
            return f"{self.asked} takes it by all {self.rules} rules that are known{notes}"
        worst = self.of(self.tier)
        if not worst:
            return self.unchecked_words
        beside = f" (and {len(worst) - 1} more)" if len(worst) > 1 else ""
        what = (
            "would not serve it as it was trained" if self.tier is Tier.FAIL else "may not serve it as it was trained"
        )
        return f"{self.asked} {what}: {worst[0].words}{beside}"

    @property
    def unchecked_words(self) -> str:
        """Which rules were not checked for this version."""
        named = ", ".join(rule.name for rule in self.unchecked[:3])
        more = f" and {len(self.unchecked) - 3} more" if len(self.unchecked) > 3 else ""
        return f"nobody checked {len(self.unchecked)} of {self.rules} rules for {self.asked}: {named}{more}"

    def lines(self) -> Iterator[str]:
        """All that was found, each with the server's own rule."""
        yield self.summary
        for held in self.held:
            yield f"{held.words}\n    {held.source}"
        if self.unchecked:
            yield self.unchecked_words

    def to_dict(self) -> dict[str, Any]:
        """The outcome as JSON holds it."""
        found = [
            {
                "rule": held.rule.name, "tier": str(held.tier), "what": held.finding.what, "says": held.rule.says,
                "source": held.rule.source, "versions": versions(held.rule),
            }
            for held in self.held
        ]  # fmt: skip
        told = {"server": self.asked.server, "version": self.asked.version, "tier": str(self.tier)}
        return {**told, "rules": self.rules, "found": found, "unchecked": [rule.name for rule in self.unchecked]}


def versions(rule: Rule) -> str:
    """Of which versions a rule was read, and when."""
    of = f"for {rule.first} to {rule.last}" if rule.first else "of the current source, checked for no version"
    return f"{of}, read on {rule.read}"


def hold(asked: Asked, checkpoint: Checkpoint, base: Base | None) -> Outcome:
    """Hold an adapter against every rule of a server that is of its version.

    Where no version is told, each rule stands as it was last read; of PEFT it is that which is installed.

    Raises:
        CheckpointError: A file that a rule reads cannot be read.
    """
    asked = _installed(asked)
    facts = Facts(checkpoint, base, asked)
    rules = [rule for rule in rules_of(asked.server) if _is_of(rule, asked.version)]
    # Of a format that the server does not open nothing else is asked.
    rules = [rule for rule in rules if rule.of == checkpoint.format] or rules[:1]
    unchecked = [rule for rule in rules if rule.check is not None and not _is_checked(rule, asked.version)]
    held = [
        Held(rule, finding, Tier.WARN if rule in unchecked and finding.tier is Tier.FAIL else finding.tier)
        for rule in rules
        for finding in (rule.check(facts) if rule.check is not None else ())
    ]
    order = list(reversed(Tier))
    return Outcome(asked, len(rules), tuple(sorted(held, key=lambda one: order.index(one.tier))), tuple(unchecked))


def _installed(asked: Asked) -> Asked:
    if asked.server != "peft" or asked.version is not None:
        return asked
    try:
        return Asked(asked.server, version("peft"), asked.flags)
    except PackageNotFoundError:
        return asked


def _is_of(rule: Rule, told: str | None) -> bool:
    """Whether a rule holds for a version that was told."""
    if told is None:
        return not rule.until
    is_later = bool(rule.until) and _cut(told, rule.until) > numbers(rule.until)
    return not is_later and numbers(told) >= numbers(rule.since)


def _is_checked(rule: Rule, told: str | None) -> bool:
    if told is None:
        return True
    if not rule.first:
        return False
    return numbers(rule.first) <= numbers(told) and _cut(told, rule.last) <= numbers(rule.last)


def _cut(told: str, to: str) -> tuple[int, ...]:
    """A version in as many numbers as another has: 0.11.2 is of 0.11."""
    return numbers(told)[: len(numbers(to))]
