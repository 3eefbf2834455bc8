"""Next-token loss, and KL divergence to the f32 cache, of one text on caches of several precisions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.cli.parse import check_at_least
from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.core.cache_params import DEFAULT_CACHE_PARAMS
from ov_kvcrush.errors import CrushError, RequestError
from ov_kvcrush.eval.likelihood.forcing import ForcedEngine
from ov_kvcrush.model.default import default_model_path
from ov_kvcrush.model.load import LoadedModel, load_model
from ov_kvcrush.pipelines.loading import load_tokenizer

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


@dataclass(frozen=True)
class Distributions:
    """logprobs: float32 (N, vocabulary) of the token after each of N positions. kv_bytes: held at the end.

    num_tokens: cached at the end.
    """

    logprobs: np.ndarray
    kv_bytes: int
    num_tokens: int


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
        model_folder = default_model_path()
    ids = _read(model_folder, text, num_context + num_positions)
    model = load_model(model_folder, "CPU", properties, "crush")
    exact = CacheConfig(key_precision="f32", value_precision="f32", attention="crush")
    reference = distributions(model, exact, ids, num_context, advance)
    rows = []
    for config in configs:
        forced = distributions(model, config, ids, num_context, advance)
        rows.append(_row(model, config, reference, forced, ids[num_context:]))
    return rows


def distributions(
    model: LoadedModel,
    cache: CacheConfig,
    ids: np.ndarray,
    num_context: int,
    advance: Callable[[int], None] = lambda rows: None,
) -> Distributions:
    """Read ids[:num_context] as a prompt, then decode the other tokens one by one as if they had been generated.

    ids: int64 (S,). advance: told the rows of each step. Returns the distributions after ids[num_context - 1 : S - 1],
    each of which can be compared with the token that follows. Raises OutOfMemory if the cache cannot hold the text.
    """
    # Without the model's limit: texts longer than its context are measured too.
    unlimited = replace(model, context_length=None)
    engine = ForcedEngine(unlimited, SchedulerConfig(), ov_genai.GenerationConfig(), lambda ids: "", cache)
    rows: list[np.ndarray] = []
    prompt = ids[:num_context], ids[num_context:], DEFAULT_CACHE_PARAMS
    (score,) = engine.force([prompt], lambda logits: rows.append(log_softmax(logits)), advance)
    return Distributions(np.stack(rows), score.kv_bytes, score.kept_tokens)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities float32 of logits (V,)."""
    shifted = logits.astype(np.float64) - logits.max()
    return (shifted - np.log(np.exp(shifted).sum())).astype(np.float32)


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) in nats per row, float64 (N,); log-probabilities (N, V)."""
    p = reference.astype(np.float64)
    return (np.exp(p) * (p - other.astype(np.float64))).sum(axis=-1)


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
    model: LoadedModel, config: CacheConfig, reference: Distributions, forced: Distributions, next_ids: np.ndarray
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
