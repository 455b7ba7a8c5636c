"""What a conversion did, as a table for people."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MOST_IGNORED_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What a conversion did; `str()` of it is a table for people."""

    source: Path | None
    """None for a model in memory."""
    source_format: str
    target: Path
    target_format: str
    architecture: str
    dtype: str
    num_source_tensors: int
    num_target_tensors: int
    num_elements: int
    num_bytes: int
    """Of the tensors written."""
    changes: Mapping[str, int]
    """How many tensors were renamed, transposed, split or joined, stacked or unstacked, cast."""
    ignored: tuple[tuple[str, str], ...]
    """Source tensors left out, and why."""
    weight_files: tuple[str, ...]
    copied_files: tuple[str, ...]
    removed_folders: tuple[Path, ...]
    """What conversions to the same target had left that were killed."""
    duration_s: float

    def __str__(self) -> str:
        shown = self.ignored[:MOST_IGNORED_SHOWN]
        changed = ", ".join(f"{number} {change}" for change, number in self.changes.items() if number)
        rate = self.num_bytes / max(self.duration_s, 1e-9) / 1e9
        files = f", {len(self.weight_files)} file(s)" if self.weight_files else ""
        rows = [
            ("source", f"{self.source or 'a model in memory'} ({self.source_format})"),
            ("target", f"{self.target} ({self.target_format})"),
            ("architecture", f"{self.architecture}, {self.num_elements:,} parameters in {self.dtype}"),
            ("tensors read", f"{self.num_source_tensors} ({changed or 'none changed'})"),
            ("tensors written", f"{self.num_target_tensors}, {self.num_bytes:,} bytes{files}"),
            *(("ignored", f"{name}: {because}") for name, because in shown),
            *([("ignored", f"and {len(self.ignored) - len(shown)} more")] if len(self.ignored) > len(shown) else []),
            ("copied", ", ".join(self.copied_files) or "nothing"),
            *(("removed", f"{path}: left by a conversion that was killed") for path in self.removed_folders),
            ("seconds", f"{self.duration_s:.1f} ({rate:.2f} GB/s)"),
        ]
        return "\n".join(f"{label:<16} {text}" for label, text in rows)
