"""The plan of one step, which CrushAttention and CrushScores read: native/src/op/plan.hpp in Python."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

VERSION = 1
STORED = 0  # rows that are appended to the store and attend to it
STAGED = 1  # rows of a fresh prompt, for PagedAttention: only their queries are captured
PREFILL = 2  # rows of a fresh prompt without PagedAttention: written to the staging blocks, and attending to them
NO_SCORES = 0  # instead of the code of a reduction
MAX_OF_ROWS = 2  # a reduction of attention scores over rows; native/src/kernels/kernels.hpp


class PlanEntry(NamedTuple):
    """`num_rows` rows of one sequence of the store: the step's from `first_row` on, the text's from `first_position`.

    kind: STORED, STAGED or PREFILL. reduce: how attention scores are reduced over captured rows; NO_SCORES: none are
    wanted.
    """

    sequence: int
    first_row: int
    num_rows: int
    first_position: int
    kind: int = STORED
    reduce: int = NO_SCORES


def write_plan(num_rows: int, num_prompt_rows: int, entries: Sequence[PlanEntry]) -> np.ndarray:
    """int32 (4 + 6 * entries,). Rows for PagedAttention, the prompt rows, come first; the others follow as entries do.

    Nothing is checked here: the native library believes no plan.
    """
    header = (VERSION, num_rows, num_prompt_rows, len(entries))
    return np.array([*header, *chain.from_iterable(entries)], np.int32)
