"""Counts of a file's records, used and dropped by reason, with the place of the first one of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from simpo_megatron.data.records import Reading


@dataclass
class BuildReport:
    """Counts of a file's records: `num_lines == num_used + sum(dropped.values())`."""

    num_lines: int = 0
    num_used: int = 0
    dropped: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    notes: Counter = field(default_factory=Counter)
    extra_keys: Counter = field(default_factory=Counter)
    """Columns and message keys that were not read, by the records that have them."""
    extra_texts: Counter = field(default_factory=Counter)
    """Those of them that hold words."""
    forms: Counter = field(default_factory=Counter)
    """The forms that records were read as."""

    def __post_init__(self) -> None:
        for name in ("dropped", "notes", "extra_keys", "extra_texts", "forms"):
            setattr(self, name, Counter(getattr(self, name)))

    def note_reading(self, reading: Reading, place: str) -> None:
        """Counts the form in which the record at `place` was read, and its columns that were not read."""
        self.forms[reading.form] += 1
        for note in reading.notes:
            self.notes[note] += 1
            self.first.setdefault(note, f"{place}: {note}: the best and the worst one are taken")
        for key, has_words in reading.unread.items():
            self.extra_keys[key] += 1
            if has_words:
                self.extra_texts[key] += 1
                self.first.setdefault(key, f"{place}: {key}: holds words")

    def add(self, other: BuildReport) -> None:
        """Adds another report's counts; the first example of each reason stays."""
        self.num_lines += other.num_lines
        self.num_used += other.num_used
        self.dropped += other.dropped
        self.notes += other.notes
        self.extra_keys += other.extra_keys
        self.extra_texts += other.extra_texts
        self.forms += other.forms
        self.first = other.first | self.first

    def place(self, reason: str) -> str:
        """`file:line` of the first record of a reason, note or column."""
        return self.first[reason].partition(f": {reason}: ")[0]

    def lines(self) -> list[str]:
        """Returns the report as lines of text."""
        text = [f"{self.num_used} pairs used, {sum(self.dropped.values())} dropped, of {self.num_lines} records"]
        for reason, count in self.dropped.most_common():
            text.append(f"  {count} {reason}, first at {self.first[reason]}")
        text += [f"  {count} pairs {note}" for note, count in self.notes.most_common()]
        if self.extra_keys:
            text.append("  columns not read: " + ", ".join(sorted(self.extra_keys)))
        return text
