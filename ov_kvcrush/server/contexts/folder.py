"""The folder that contexts are kept in: for each owner a folder, for each context a .kvc file and its figures."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from ov_kvcrush.contexts.context import Context
from ov_kvcrush.errors import ContextFileError
from ov_kvcrush.server.contexts.held import FIGURES, HeldContext
from ov_kvcrush.server.logs import tell
from ov_kvcrush.utils.atomic import atomic_write

_ID = re.compile(r"ctx_[0-9a-f]{32}")
_OWNER = re.compile(r"local|[0-9a-f]{32}")
_MAX_FIGURES = 1 << 16  # bytes


class ContextFolder:
    """Files are written whole or not at all. Names in it are the server's own: nothing of a request is in a path."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def scan(self) -> Iterator[HeldContext]:
        """All that are there; what cannot be read is left where it is."""
        for path in sorted(self._folder.glob("*/ctx_*.kvc")):
            if _ID.fullmatch(path.stem) and _OWNER.fullmatch(path.parent.name):
                try:
                    yield _read(path)
                except (OSError, ValueError, RecursionError) as error:
                    tell("context left out", logging.WARNING, context=path.stem, reason=type(error).__name__)

    def write(self, held: HeldContext, context: Context) -> Path:
        """Write one. Raises ContextFileError; nothing is left of it then."""
        path = self._path(held)
        figures = path.with_suffix(".json")
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            context.save(path)
            atomic_write(figures, [json.dumps(held.figures()).encode()])
        except (OSError, ContextFileError) as error:
            self._unlink(path)
            raise ContextFileError(f"contexts_dir must have room for a context, got {error}") from error
        return path

    def remove(self, held: HeldContext) -> None:
        """Remove the files of one."""
        self._unlink(self._path(held))

    def _path(self, held: HeldContext) -> Path:
        return self._folder / held.owner / f"{held.id}.kvc"

    @staticmethod
    def _unlink(path: Path) -> None:
        for name in (path, path.with_suffix(".json")):
            with suppress(OSError):
                name.unlink(missing_ok=True)


def _read(path: Path) -> HeldContext:
    figures = path.with_suffix(".json")
    if figures.stat().st_size > _MAX_FIGURES:
        raise ValueError("figures must be short")
    values: dict[str, Any] = json.loads(figures.read_bytes())
    for name, kinds in FIGURES.items():
        if type(values.get(name)) not in kinds:
            raise ValueError(f"{name} must be of type {kinds[0].__name__}")
    title, policy = values.get("name"), values.get("policy")
    if not isinstance(title, (str, type(None))) or not isinstance(policy, (dict, type(None))):
        raise ValueError("name must be a text, policy an object")
    known = {name: values[name] for name in FIGURES}
    return HeldContext(
        id=path.stem, owner=path.parent.name, name=title, policy=policy, path=path, used=values["created"], **known
    )
