"""What the benchmark found, as rows: of a table to be read, and of a JSON file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path


@dataclasses.dataclass
class Row:
    """One line of the table. Times are the least of the repeats."""

    backend: str
    device: str
    scene: str
    images: int
    gaussians: int
    size: int
    forward_ms: float
    forward_backward_ms: float
    median_forward_backward_ms: float | None
    automatic_ms: float | None
    """Forward and backward where the program was compiled without a capacity."""
    compile_s: float | None
    memory_gib: float | None
    """Most memory of the process (CPU) or the device (others) up to here."""
    bytes: float
    operations: float
    limit_ms: float
    """Of forward and backward."""
    predicted: bool = False

    @property
    def automatic_slowdown(self) -> float | None:
        """How many times as long it takes without a capacity."""
        return self.automatic_ms and self.automatic_ms / self.forward_backward_ms

    @property
    def images_per_s(self) -> float:
        return 1e3 * self.images / self.forward_backward_ms


def write_json(path: Path, rows: list[Row]) -> None:
    """Writes the rows under a temporary name, then renames it."""
    partial = path.with_name(path.name + ".partial")
    more = ("images_per_s", "automatic_slowdown")
    records = [
        {**dataclasses.asdict(row), **{name: getattr(row, name) for name in more}} for row in rows
    ]
    try:
        partial.write_text(json.dumps(records, indent=1) + "\n")
        partial.replace(path)
    except OSError as error:
        raise OSError(f"--json {path}: cannot be written ({error.strerror})") from error


def format_table(rows: list[Row]) -> str:
    """The rows as text, one line each."""
    head = (
        "backend", "device", "scene", "images", "Gaussians", "forward ms", "fwd+bwd ms",
        "median", "x auto", "images/s", "compile s", "peak GiB", "GB", "Gop", "limit ms", "x limit",
    )  # fmt: skip

    def number(value: float | None, digits: int = 1) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = [
        (
            row.backend,
            row.device,
            row.scene,
            str(row.images),
            str(row.gaussians),
            number(row.forward_ms, 2),
            number(row.forward_backward_ms, 2),
            number(row.median_forward_backward_ms, 2),
            number(row.automatic_slowdown, 2),
            number(row.images_per_s),
            number(row.compile_s),
            number(row.memory_gib, 2),
            number(row.bytes / 1e9, 2),
            number(row.operations / 1e9),
            number(row.limit_ms, 2),
            "predicted" if row.predicted else number(row.forward_backward_ms / row.limit_ms),
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column < 3 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *lines)
    )
