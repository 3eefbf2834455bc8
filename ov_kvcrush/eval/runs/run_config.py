"""The configuration of a run, as config.json in its folder holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from types import MappingProxyType
from typing import Any, TypeVar

from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.records import Setting
from ov_kvcrush.utils.checks import check_integer, check_object, check_string, known_options

# The part of the environment that can change a score; a run may be resumed if the rest differs.
_DECISIVE = ("cpu", "kernel", "versions")

T = TypeVar("T")


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run, and the machine it ran on.

    command: as typed. model: path of its folder. fingerprint: of the model, the same wherever its folder is.
    num_items: items of the suite, limit applied. environment: of cli.environment.describe_environment().
    options: of the suite (length, data, limit), JSON values.
    Raises CrushError for wrong types, no setting, or the same one twice.
    """

    command: str
    suite: str
    model: str
    fingerprint: str
    settings: tuple[Setting, ...]
    num_items: int
    seed: int
    environment: Mapping[str, Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("command", "suite", "model", "fingerprint"):
            check_string(name, getattr(self, name))
        check_integer("num_items", self.num_items, 1)
        check_integer("seed", self.seed, 0)
        check_object("environment", self.environment)
        check_object("options", self.options)
        keys = {setting.key for setting in self.settings}
        if not keys or len(keys) < len(self.settings):
            raise CrushError(f"settings must be at least one, none twice, got {len(keys)} in {len(self.settings)}")

    @property
    def json(self) -> dict[str, Any]:
        """The content of the file."""
        return dict(json.loads(json.dumps(asdict(self))))

    @classmethod
    def from_json(cls, value: Any, where: str) -> RunConfig:
        """The config that a file holds. Raises CrushError, which begins with `where`, for anything else."""
        settings = value.get("settings") if isinstance(value, dict) else None
        if not isinstance(settings, list):
            raise CrushError(f"{where}: settings must be a list, got {settings!r}")
        made = tuple(_setting(setting, f"{where}: settings[{i}]") for i, setting in enumerate(settings))
        return from_json(cls, {**value, "settings": made}, where)

    def differences(self, other: RunConfig) -> list[str]:
        """Sorted names of the fields in which the other is another run; command and model path do not count."""
        mine, others = self._identity(), other._identity()
        return sorted(name for name in {*mine, *others} if mine.get(name) != others.get(name))

    def _identity(self) -> dict[str, Any]:
        whole = self.json
        found = {name: whole[name] for name in ("suite", "fingerprint", "num_items", "seed")}
        found["settings"] = sorted(setting.key for setting in self.settings)
        found.update({f"options.{name}": value for name, value in whole["options"].items()})
        found.update({f"environment.{name}": whole["environment"].get(name) for name in _DECISIVE})
        return found


def _setting(value: Any, where: str) -> Setting:
    """A setting; runs from before there were budgets and recall have none."""
    return from_json(Setting, value, where, {"budget": None, "recall_tokens": None})


def from_json(cls: type[T], value: Any, where: str, later: Mapping[str, Any] = MappingProxyType({})) -> T:
    """The dataclass with the fields of a JSON object, none left out but those that came later, with their values.

    Raises CrushError, which begins with `where`.
    """
    try:
        if not isinstance(value, dict):
            raise CrushError(f"content must be a JSON object, got {str(value)[:60]!r}")
        value = {**later, **value}
        known_options(value, cls, "field")
        for name in (f.name for f in fields(cls)):  # type: ignore[arg-type]
            if name not in value:
                raise CrushError(f"{name} must be given, got none")
        return cls(**value)
    except CrushError as error:
        raise CrushError(f"{where}: {error}") from None
