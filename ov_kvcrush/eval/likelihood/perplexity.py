"""Next-token loss, and KL divergence to the f32 cache, of one text on caches of several precisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ov_kvcrush.cli.parse import check_at_least
from ov_kvcrush.config import CacheConfig
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.eval.likelihood.forcing import Forced, force, kl_divergence
from ov_kvcrush.model.load import LoadedModel, load_model
from ov_kvcrush.pipelines.base import load_tokenizer

DEFAULT_PRECISIONS = ("bf16/bf16", "u8/u8", "u8/u4", "u4/u4", "u4/u2", "u2/u2")


@dataclass(frozen=True)
class PerplexityRow:
    """One pair of precisions. kl, loss: mean nats per position. top1: share of positions. Bytes are of all layers."""

    key_precision: str
    value_precision: str
    kl: float
    kl_max: float
    loss: float
    top1: float
    positions: int
    bytes_per_token: float
    settled_bytes_per_token: float


def parse_precisions(text: str) -> list[CacheConfig]:
    """Configs from "u8/u4,...". Raises CrushError for anything else."""
    configs = []
    for pair in text.split(","):
        key, slash, value = pair.strip().partition("/")
        if not slash:
            raise CrushError(f"--precisions must be pairs of keys/values such as u8/u4, got {pair!r}")
        configs.append(CacheConfig(key_precision=key, value_precision=value, attention="crush"))
    return configs


def perplexity(
    model_folder: Path | None,
    text: Path,
    num_context: int,
    num_positions: int,
    configs: list[CacheConfig],
    properties: dict[str, Any],
    advance: Callable[[int], None] = lambda rows: None,
) -> list[PerplexityRow]:
    """Measure each config against the f32 cache. Raises CrushError for a text that is too short or cannot be read."""
    check_at_least("context", num_context, 1)
    check_at_least("positions", num_positions, 1)
    if model_folder is None:
        from ov_kvcrush.model.default import default_model_path

        model_folder = default_model_path()
    ids = _read(model_folder, text, num_context + num_positions)
    model = load_model(model_folder, "CPU", properties, "crush")
    exact = CacheConfig(key_precision="f32", value_precision="f32", attention="crush")
    reference = force(model, exact, ids, num_context, advance)
    rows = []
    for config in configs:
        forced = force(model, config, ids, num_context, advance)
        rows.append(_row(model, config, reference, forced, ids[num_context:]))
    return rows


def _read(model_folder: Path, text: Path, count: int) -> np.ndarray:
    try:
        content = text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"--text must be a readable UTF-8 file, got {str(text)!r}: {error}") from None
    ids = np.asarray(load_tokenizer(model_folder, {}).encode(content).input_ids.data[0], np.int64)
    if len(ids) < count:
        raise RequestError(f"--text must have at least {count} tokens (--context + --positions), got {len(ids)}")
    return ids[:count]


def _row(
    model: LoadedModel, config: CacheConfig, reference: Forced, forced: Forced, next_ids: np.ndarray
) -> PerplexityRow:
    from ov_kvcrush.native import tile_bytes

    kl = kl_divergence(reference.logprobs, forced.logprobs)
    precisions = config.key_precision, config.value_precision
    settled = sum(
        x.num_kv_heads * tile_bytes(*precisions, x.head_size, int(np.gcd(config.group_size, x.head_size)))
        for x in model.layers
    )
    agree = forced.logprobs.argmax(axis=1) == reference.logprobs.argmax(axis=1)
    return PerplexityRow(
        key_precision=config.key_precision,
        value_precision=config.value_precision,
        kl=float(kl.mean()),
        kl_max=float(kl.max()),
        loss=float(-forced.logprobs[np.arange(len(next_ids)), next_ids].mean()),
        top1=float(agree.mean()),
        positions=len(next_ids),
        bytes_per_token=forced.kv_bytes / forced.num_tokens,
        settled_bytes_per_token=settled / 32,
    )
