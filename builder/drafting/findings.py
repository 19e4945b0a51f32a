"""One value of a new recipe, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class DraftValue:
    """A value, with its file and line, or with the reason for a guess."""

    key: str
    "As recipe.toml has it, as `build.environment`."
    value: str
    read: bool
    origin: str
    "File and line where it was read, else the reason for the guess."

    @property
    def sentence(self) -> str:
        """For NOTES.md and comments."""
        return f"read in {self.origin}" if self.read else f"guessed: {self.origin}"


@dataclass(kw_only=True)
class Findings:
    """What was found, in the order of recipe.toml; and what a person has to look at."""

    values: list[DraftValue] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def read(self, key: str, value: str, origin: object) -> None:
        """Note a value that was read from the source."""
        self.values.append(DraftValue(key=key, value=value, read=True, origin=str(origin)))

    def guess(self, key: str, value: str, reason: str) -> None:
        """Note a guessed value."""
        self.values.append(DraftValue(key=key, value=value, read=False, origin=reason))

    def of(self, key: str) -> Sequence[DraftValue]:
        """The findings about one key."""
        return [finding for finding in self.values if finding.key == key]

    def comments(self, key: str) -> Iterator[str]:
        """A comment for each finding about a key."""
        for finding in self.of(key):
            yield f"# {finding.value}: {finding.sentence}"
