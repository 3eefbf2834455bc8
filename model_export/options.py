"""How the weights of an exported model are stored."""

from __future__ import annotations

from dataclasses import dataclass

from ov_kvcrush.errors import ExportError, did_you_mean

WEIGHT_FORMATS = ("fp32", "fp16", "int8", "int4")
# Bytes of one weight, with the scales and zero points of its group.
BYTES_PER_WEIGHT = {"fp32": 4.0, "fp16": 2.0, "int8": 1.02, "int4": 0.60}
DEFAULT_GROUP_SIZE = 128


@dataclass(frozen=True)
class WeightOptions:
    """Format of the weights, checked when built; raises ExportError naming the field.

    weight_format: fp32, fp16, int8 (one scale per row) or int4 (one scale per group).
    group_size: int4 only: weights that share a scale; -1 for a whole row; None for 128, or less where rows are short.
    ratio: int4 only: fraction of the weights that become int4, the most sensitive rest int8; in (0, 1]; None for 1.
    sym: symmetric values, without zero points: a little faster, a little less exact; None for asymmetric.
    """

    weight_format: str = "int8"
    group_size: int | None = None
    ratio: float | None = None
    sym: bool | None = None

    def __post_init__(self) -> None:
        if self.weight_format not in WEIGHT_FORMATS:
            hint = did_you_mean(str(self.weight_format), WEIGHT_FORMATS)
            known = ", ".join(WEIGHT_FORMATS)
            raise ExportError(f"weight_format must be one of {known}, got {self.weight_format!r}{hint}")
        for name in ("group_size", "ratio"):
            if getattr(self, name) is not None and self.weight_format != "int4":
                raise ExportError(f"{name} must be left out unless weight_format is int4, got {self.weight_format}")
        if self.sym is not None and self.weight_format not in ("int8", "int4"):
            raise ExportError(f"sym must be left out unless weight_format is int8 or int4, got {self.weight_format}")
        size = self.group_size
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or (size != -1 and size < 16)):
            raise ExportError(f"group_size must be -1 or a whole number of at least 16, got {size!r}")
        ratio = self.ratio
        if ratio is not None and (not isinstance(ratio, int | float) or not 0 < ratio <= 1):
            raise ExportError(f"ratio must be in (0, 1], got {ratio!r}")
