"""Logits of given tokens behind stored sequences: any rows of many sequences in one inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ov_kvcrush import native
from ov_kvcrush.engine.model_runner import ModelRunner
from ov_kvcrush.errors import OutOfMemory
from ov_kvcrush.kvcache.attention_plan import STORED, PlanEntry, write_plan
from ov_kvcrush.kvcache.crush import CrushKVCache
from ov_kvcrush.kvcache.model_inputs import PrefillInputs
from ov_kvcrush.model.graph.rewrite import CRUSH_PLAN, CRUSH_STORE, SAMPLED_ROWS
from ov_kvcrush.model.load import LoadedModel


@dataclass(frozen=True, eq=False)
class Following:
    """Tokens int64 (T,) that follow a stored sequence from `position` on, and are appended to it.

    skip: of the first ones no logits are wanted; less than T.
    """

    store_id: int
    tokens: np.ndarray
    position: int
    skip: int = 0


class StoredRows:
    """A model and an inference request for rows that follow stored sequences, of any store on that model.

    Nothing else may touch the stores meanwhile: an engine's are read between two steps.
    """

    def __init__(self, model: LoadedModel, cache: CrushKVCache) -> None:
        self._runner = ModelRunner(model, cache)
        self._pages_prompts = model.pages_prompts
        self._prefill_inputs = PrefillInputs(cache.staging.pool.num_blocks)

    def logits(
        self, store: native.Store, following: Sequence[Following], *, one_by_one: bool = False
    ) -> list[np.ndarray]:
        """Of each, float32 (T - skip, vocabulary): what comes after its tokens. Maybe views until the next call.

        one_by_one: an inference for each row from `skip` on, as recall needs, since steps of many rows read everything.
        Raises OutOfMemory.
        """
        if not one_by_one or all(len(one.tokens) - one.skip <= 1 for one in following):
            return self._run(store, following)
        first = [Following(x.store_id, x.tokens[: x.skip + 1], x.position, x.skip) for x in following]
        found = [[rows.copy()] for rows in self._run(store, first)]
        for step in range(1, max(len(x.tokens) - x.skip for x in following)):
            left = [i for i, x in enumerate(following) if x.skip + step < len(x.tokens)]
            places = [(following[i], following[i].skip + step) for i in left]
            now = [Following(x.store_id, x.tokens[at : at + 1], x.position + at) for x, at in places]
            for i, rows in zip(left, self._run(store, now), strict=True):
                found[i].append(rows.copy())
        return [np.concatenate(rows) for rows in found]

    def _run(self, store: native.Store, following: Sequence[Following]) -> list[np.ndarray]:
        counts = [len(one.tokens) for one in following]
        begins = np.concatenate([[0], np.cumsum(counts)])
        total = int(begins[-1])
        entries = []
        for one, begin in zip(following, begins, strict=False):
            if not store.reserve(one.store_id, len(one.tokens)):
                raise OutOfMemory(f"KV store must have room for {len(one.tokens)} tokens more; raise max_bytes")
            entries.append(PlanEntry(one.store_id, int(begin), len(one.tokens), one.position, STORED))
        wanted = [np.arange(begins[i] + one.skip, begins[i + 1]) for i, one in enumerate(following)]
        self._runner.set_inputs(
            {
                **(self._prefill_inputs([], [], 0, total) if self._pages_prompts else {}),
                "input_ids": np.concatenate([one.tokens for one in following]).astype(np.int64),
                "position_ids": np.concatenate(
                    [np.arange(one.position, one.position + len(one.tokens), dtype=np.int64) for one in following]
                ),
                SAMPLED_ROWS: np.concatenate(wanted).astype(np.int64),
                CRUSH_STORE: np.array([store.id], np.int32),
                CRUSH_PLAN: write_plan(total, 0, entries),
            }
        )
        return np.split(self._runner.infer(), np.cumsum([len(rows) for rows in wanted])[:-1])
