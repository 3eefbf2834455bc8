"""The small input tensors of one step."""

from __future__ import annotations

from collections.abc import Sequence as Items

import numpy as np

from ov_kvcrush.core.step import ScheduledTokens
from ov_kvcrush.kvcache.block_pool import blocks_for
from ov_kvcrush.model.graph.adapters import ADAPTER_ALPHAS
from ov_kvcrush.model.graph.rewrite import PAGED_ROWS


def row_inputs(rows: Items[ScheduledTokens]) -> dict[str, np.ndarray]:
    """input_ids, position_ids i64 (T,) of T rows; adapter_alphas f32 (T, adapters) where the model has adapters."""
    ids = [row.ids for row in rows]
    counts = np.array([row.num_tokens for row in rows])
    past = np.array([row.sequence.num_cached + row.sequence.position_offset for row in rows])
    ends = np.cumsum(counts)
    positions = np.arange(ends[-1], dtype=np.int64) + np.repeat(past - (ends - counts), counts)
    inputs = {"input_ids": np.concatenate(ids), "position_ids": positions}
    alphas = [row.sequence.request.adapters.alphas for row in rows]
    if alphas[0]:
        inputs[ADAPTER_ALPHAS] = np.repeat(np.array(alphas, np.float32), counts, axis=0)
    return inputs


def paged_inputs(rows: Items[ScheduledTokens], tables: Items[np.ndarray]) -> dict[str, np.ndarray]:
    """PagedAttention's inputs for B sequences, none at all included. tables: int32, the blocks of each.

    past_lens i32 (B,) · subsequence_begins, block_indices_begins i32 (B+1,) · block_indices i32 (all blocks,) ·
    max_context_len i32 ().
    """
    counts = np.array([row.num_tokens for row in rows], np.int64)
    past = np.array([row.sequence.num_cached for row in rows], np.int64)
    # A table may hold blocks for tokens that come later: PagedAttention takes the number of blocks at its word.
    used = [table[: blocks_for(length)] for table, length in zip(tables, past + counts, strict=True)]
    begins = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(counts, out=begins[1:])
    block_begins = np.zeros(len(rows) + 1, np.int32)
    np.cumsum([len(t) for t in used], out=block_begins[1:])
    return {
        "past_lens": past.astype(np.int32),
        "subsequence_begins": begins,
        "block_indices": np.concatenate(used) if used else np.zeros(0, np.int32),
        "block_indices_begins": block_begins,
        "max_context_len": np.array((past + counts).max(initial=0), np.int32),
    }


def sampled_rows(rows: Items[ScheduledTokens], order: Items[ScheduledTokens]) -> np.ndarray:
    """i64: the last rows of each of `rows` that sample, in a step whose rows come in `order`."""
    ends = dict(zip((row.sequence for row in order), np.cumsum([row.num_tokens for row in order]), strict=True))
    return np.array([ends[r.sequence] - i for r in rows for i in range(r.num_samples, 0, -1)], np.int64)


class PrefillInputs:
    """PagedAttention's inputs where only rows of fresh prompts attend through it.

    dummy_block: what it makes of the other rows is written there, and not read.
    """

    def __init__(self, dummy_block: int) -> None:
        self._dummy_block = dummy_block
        self._last_rows = 0  # that PagedAttention was run with

    def __call__(
        self, staged: Items[ScheduledTokens], tables: Items[np.ndarray], num_staged_rows: int, num_rows: int
    ) -> dict[str, np.ndarray]:
        """All rows of a step with fresh prompts, else none."""
        # Where it is skipped its last output stays, and is converted again in every step: so it also gets the rows of
        # the first step after many rows, which leaves a small one.
        is_idle = not staged and 0 < self._last_rows <= num_rows
        paged_rows = 0 if is_idle else num_rows
        self._last_rows = paged_rows or self._last_rows
        paged = {}  # what it was given last may stay where it is skipped
        if paged_rows:
            paged = with_dummy_rows(paged_inputs(staged, tables), num_rows - num_staged_rows, self._dummy_block)
        return {**paged, PAGED_ROWS: np.array([paged_rows], np.int64)}


def with_dummy_rows(inputs: dict[str, np.ndarray], num_rows: int, block: int) -> dict[str, np.ndarray]:
    """PagedAttention's inputs, and behind its sequences `num_rows` of one token each, all in `block`.

    PagedAttention must be given all rows that there are.
    """
    if not num_rows:
        return inputs
    steps = np.arange(1, num_rows + 1, dtype=np.int32)
    begins, block_begins = inputs["subsequence_begins"], inputs["block_indices_begins"]
    return {
        "past_lens": np.concatenate([inputs["past_lens"], np.zeros(num_rows, np.int32)]),
        "subsequence_begins": np.concatenate([begins, begins[-1] + steps]),
        "block_indices": np.concatenate([inputs["block_indices"], np.full(num_rows, block, np.int32)]),
        "block_indices_begins": np.concatenate([block_begins, block_begins[-1] + steps]),
        "max_context_len": np.array(max(int(inputs["max_context_len"]), 1), np.int32),
    }
