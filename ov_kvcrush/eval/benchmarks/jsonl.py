"""Lines of jsonl files, and their fields, checked: whatever is wrong is named by file and line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ov_kvcrush.errors import CrushError


def records(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield "FILE:LINE" and the object of each line that is not empty. Raises CrushError for anything else."""
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                record = _parse(line)
                if not isinstance(record, dict):
                    raise CrushError(f"{file}:{number}: line must be a JSON object, got {line.strip()[:60]!r}")
                yield f"{file}:{number}", record
    except (OSError, UnicodeDecodeError) as error:
        raise CrushError(f"{file} must be readable UTF-8, got {error}") from None


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def text_of(record: dict[str, Any], field: str, where: str, empty: bool = False) -> str:
    """A text. where: "FILE:LINE". Raises CrushError naming both for anything else."""
    value = record.get(field)
    if not isinstance(value, str) or not (value or empty):
        raise CrushError(f"{where}: {field} must be {'a' if empty else 'a non-empty'} text, {_got(record, field)}")
    return value


def texts_of(record: dict[str, Any], field: str, where: str) -> tuple[str, ...]:
    """A list of at least one text. Raises CrushError naming file, line and field for anything else."""
    value = record.get(field)
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise CrushError(f"{where}: {field} must be a list with at least one text, {_got(record, field)}")
    return tuple(value)


def _got(record: dict[str, Any], field: str) -> str:
    return f"got {str(record[field])[:60]!r}" if field in record else "got no such field"
