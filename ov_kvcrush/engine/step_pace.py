"""How many prompt rows fit into a step that must not take long, learnt from the steps that were run."""

from __future__ import annotations

_FIRST_ROWS = 32  # of the first chunk that others wait for, whatever the machine
_FEWEST_ROWS = 16
_NEWEST = 0.5  # weight of the newest step: a row's cost grows with the text before it


class StepPace:
    """Rows of prompts beside decode rows, by the time that a step may take.

    Between two tokens of a decoding request lies one step: t = decode + row * rows. Both are measured; a step without
    decode rows tells `row`, since reading the weights is little beside hundreds of rows.
    max_seconds: of a step; 0 = no limit.
    """

    def __init__(self, max_seconds: float) -> None:
        self._max_seconds = max_seconds
        self._decode_s = 0.0
        self._row_s = 0.0  # 0 = not known
        self._last_rows = _FIRST_ROWS

    @property
    def row_seconds(self) -> float:
        """What a prompt row takes; a guess before the first."""
        return self._row_s or 1e-3

    def rows_beside_decodes(self, most: int) -> int:
        """Prompt rows of the next step, at most `most`, where sequences decode in it."""
        if not self._max_seconds:
            return most
        if not self._row_s:
            return min(most, _FIRST_ROWS)
        rows = int((self._max_seconds - self._decode_s) / self._row_s) // _FEWEST_ROWS * _FEWEST_ROWS
        # What a few rows took says little of many: no more than twice as many as were tried.
        return min(most, max(min(rows, 2 * self._last_rows), _FEWEST_ROWS))

    def note(self, num_decodes: int, num_prompt_rows: int, seconds: float) -> None:
        """What a step took."""
        if not num_prompt_rows:
            self._decode_s = _mixed(self._decode_s, seconds)
        elif num_prompt_rows >= _FEWEST_ROWS:
            beside = self._decode_s if num_decodes else 0.0
            # A step that was faster than decodes alone says that these are fewer now.
            row_s = max(seconds - beside, seconds / 2) / num_prompt_rows
            # Slower ones count at once, or the next step is too long.
            self._row_s = row_s if row_s > self._row_s else _mixed(self._row_s, row_s)
            self._last_rows = num_prompt_rows


def _mixed(old: float, new: float) -> float:
    return (1 - _NEWEST) * old + _NEWEST * new if old else new
