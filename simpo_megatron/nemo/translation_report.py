"""The report on how each key of a NeMo file was read."""

from __future__ import annotations

from dataclasses import dataclass, field

from simpo_megatron.errors import listed

_MAX_KEYS = 4


@dataclass(frozen=True)
class TranslationReport:
    """A report on every key of a file; a key is in exactly one of the first three dicts."""

    dialect: str
    path: str
    taken: dict[str, str] = field(default_factory=dict)
    """The option that was given the value as it stands, as `option=value`."""
    translated: dict[str, str] = field(default_factory=dict)
    """The settings it was translated to, as `option=value, option=value`."""
    ignored: dict[str, str] = field(default_factory=dict)
    """The reason."""
    differs: dict[str, str] = field(default_factory=dict)
    """Differences from NeMo, by a key of the file or by subject."""

    def lines(self, *, every_key: bool = False) -> list[str]:
        """A summary, a line for each taken or translated key and for each difference, and one for all ignored keys.

        Args:
            every_key: name all keys of a difference, and the ignored ones, in one line for each reason.
        """
        counts = f"{len(self.taken)} taken, {len(self.translated)} translated, {len(self.ignored)} ignored"
        lines = [f"{self.path}: {self.dialect} configuration, keys: {counts}"]
        lines += [f"  taken       {key} -> {setting}" for key, setting in self.taken.items()]
        lines += [f"  translated  {key} -> {settings}" for key, settings in self.translated.items()]
        plain = {key: reason for key, reason in self.ignored.items() if key not in self.differs}
        if every_key:
            return lines + _by_reason("differs", self.differs) + _by_reason("ignored", plain)
        lines += _by_reason("differs", self.differs, _MAX_KEYS)
        return [*lines, f"  ignored     {len(plain)} keys; --explain-config names them and why"] if plain else lines


def _by_reason(heading: str, reasons: dict[str, str], most: int = 10_000) -> list[str]:
    """A line for each reason, with the first `most` of its keys."""
    keys: dict[str, list[str]] = {}
    for key, reason in reasons.items():
        keys.setdefault(reason, []).append(key)
    return [f"  {heading:11} {listed(named, most, ' ')}: {reason}" for reason, named in keys.items()]
