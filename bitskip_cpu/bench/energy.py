"""The energy that the processor's packages count (RAPL), where the system lets one read it."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Energy:
    """Joules of all packages between two moments; of the whole machine, whatever runs on it."""

    def __init__(self, root: Path = POWERCAP) -> None:
        """root: Linux's folder of counters; where there is none, or none to be read, no figures."""
        self._zones = [
            zone for zone in sorted(root.glob("intel-rapl:[0-9]")) if _number(zone, "energy_uj")
        ]  # AMD's processors count under this name, too

    def read(self) -> list[int] | None:
        """What the counters say, in microjoules; None without counters."""
        found = [_number(zone, "energy_uj") for zone in self._zones]
        return found if found and None not in found else None  # type: ignore[return-value]

    def joules(self, before: list[int] | None) -> float | None:
        """Joules since an earlier `read`; a counter may have begun anew once."""
        after = self.read()
        if before is None or after is None:
            return None
        ranges = [_number(zone, "max_energy_range_uj") or 0 for zone in self._zones]
        spent = (
            b - a if b >= a else b - a + most
            for a, b, most in zip(before, after, ranges, strict=True)
        )
        return sum(spent) / 1e6


def _number(zone: Path, name: str) -> int | None:
    try:
        return int((zone / name).read_text())
    except (OSError, ValueError):
        return None
