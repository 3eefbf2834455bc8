"""The logits of a text that is read in uneven chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ov_kvcrush import CacheConfig, SchedulerConfig
from ov_kvcrush.core.request import Request
from ov_kvcrush.core.sampling_params import SamplingParams
from ov_kvcrush.engine.model_runner import ModelRunner
from ov_kvcrush.engine.scheduler import ScheduledTokens, SchedulerOutput
from ov_kvcrush.kvcache.factory import make_kv_cache_manager
from ov_kvcrush.model.load import load_model

F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}
# Row counts of the steps: a prompt in uneven chunks that cross blocks of 32 and windows of 16, then single tokens.
CHUNKS = (1, 30, 2, 37, 1, 1, 1, 5, 1, 1)
# What goes through the store and not through staging blocks: a pool of one or two blocks takes no such prompt.
NO_STAGING = 70_000


def logits_at_chunk_ends(
    folder: Path, ids: np.ndarray, cache: CacheConfig, properties: dict[str, Any] | None = None
) -> np.ndarray:
    """Logits (steps, vocabulary) of the last row of each step."""
    model = load_model(folder, "CPU", F32 if properties is None else properties, cache.attention, cache.sharing)
    manager = make_kv_cache_manager(model, SchedulerConfig(num_kv_blocks=8), cache)
    runner = ModelRunner(model, manager)
    sequence = Request(0, ids, SamplingParams(max_new_tokens=1)).sequences[0]
    assert manager.allocate(sequence)
    logits = []
    for count in CHUNKS:
        assert manager.append_slots(sequence, count)
        row = ScheduledTokens(sequence, count, True)
        runner.prepare(SchedulerOutput((row,), ()))
        logits.append(runner.infer()[0].copy())
        sequence.num_cached += count
        assert not manager.commit([row], runner.attention_scores)
    return np.stack(logits)
