"""The report on how each key of a NeMo file was read."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class TranslationReport:
    """The fate of every key of a file, by key; a key stands in one of the first three."""

    dialect: str
    path: str
    taken: dict[str, str] = field(default_factory=dict)
    """The option that was given the value as it stands, as `option=value`."""
    translated: dict[str, str] = field(default_factory=dict)
    """The settings it was translated to, as `option=value, option=value`."""
    ignored: dict[str, str] = field(default_factory=dict)
    """The reason."""
    differs: dict[str, str] = field(default_factory=dict)
    """What is not the same here as there, by a key of the file, or by what of it is spoken of."""

    def lines(self, *, every_key: bool = False) -> list[str]:
        """A summary, a line for each taken or translated key and for what differs, and one for all ignored keys.

        Args:
            every_key: name the ignored keys, in one line for each reason.
        """
        counts = f"{len(self.taken)} taken, {len(self.translated)} translated, {len(self.ignored)} ignored"
        lines = [f"{self.path}: {self.dialect} configuration, keys: {counts}"]
        lines += [f"  taken       {key} -> {setting}" for key, setting in self.taken.items()]
        lines += [f"  translated  {key} -> {settings}" for key, settings in self.translated.items()]
        lines += [f"  differs     {key}: {here}" for key, here in self.differs.items()]
        plain = {key: reason for key, reason in self.ignored.items() if key not in self.differs}
        if every_key:
            return lines + self._by_reason(plain)
        return [*lines, f"  ignored     {len(plain)} keys; --explain-config names them and why"] if plain else lines

    @staticmethod
    def _by_reason(ignored: dict[str, str]) -> list[str]:
        reasons: dict[str, list[str]] = {}
        for key, reason in ignored.items():
            reasons.setdefault(reason, []).append(key)
        return [f"  ignored     {' '.join(keys)}: {reason}" for reason, keys in reasons.items()]
