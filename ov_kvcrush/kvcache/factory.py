"""The cache manager that a loaded model and the configs ask for."""

from __future__ import annotations

from ov_kvcrush import native
from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.errors import CrushError, OutOfMemory
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE, blocks_for
from ov_kvcrush.kvcache.block_tensors import BlockTensors, cache_inputs, staging_tensors
from ov_kvcrush.kvcache.crush import CrushKVCache
from ov_kvcrush.kvcache.manager import KVCacheManager
from ov_kvcrush.kvcache.paged import PagedKVCache
from ov_kvcrush.kvcache.planning import recent_precision
from ov_kvcrush.kvcache.recall import RECALL_ROWS, recall_of
from ov_kvcrush.kvcache.room import PrefixLimit
from ov_kvcrush.kvcache.staging import Staging
from ov_kvcrush.model.load import LoadedModel
from ov_kvcrush.utils.process_memory import free_memory_bytes

_FREE_MEMORY_SHARE = 0.5  # of the free memory, taken by a cache without a given size
_STAGING_SHARE = 0.25  # of the free memory, at most, taken by staging blocks without a given size
_PREFIX_SHARE = 0.25  # of a store without a given size, taken by the KV of ended requests
_STAGED_TOKENS = 65536  # of prompts read at the same time, where staging has no given size


def make_kv_cache_manager(
    model: LoadedModel, scheduler: SchedulerConfig, cache: CacheConfig, shared: KVCacheManager | None = None
) -> KVCacheManager:
    """The cache manager of an engine. Raises CrushError or OutOfMemory if the configs ask for what cannot be.

    shared: one over a store on the same model, whose staging blocks this one shares; `cache.staging_bytes` does not
    hold then. Each store has a limit of its own, `cache.max_bytes`, else by `scheduler`: num_kv_blocks are the bytes of
    so many tokens in its precisions; cache_size, or half of the memory that is free now, is the same for each, so
    stores that are filled together need limits that fit together.
    """
    if cache.sharing not in ((), model.shared_layers):
        raise CrushError(
            f"shared_layers must be those that the model was loaded with, {dict(model.shared_layers)}, "
            f"got {dict(cache.sharing)}"
        )
    # Without prefix caching only the conversation that runs keeps its KV between turns.
    max_prefixes = None if scheduler.enable_prefix_caching else 1
    if model.attention == "paged":
        blocks = cache_inputs(model.compiled)
        return PagedKVCache(BlockTensors(blocks, lambda size: _paged_blocks(scheduler, size)), max_prefixes)
    store = _make_store(model, scheduler, cache)
    if shared is None:
        layouts = (
            cache_inputs(model.compiled)
            if model.pages_prompts
            else staging_tensors(model.layers, model.recent_precision)
        )
        tensors = BlockTensors(layouts, lambda size: _staging_blocks(cache, model.context_length, size) + 1)
        staging = Staging(tensors)
    else:
        assert isinstance(shared, CrushKVCache), "a shared cache without staging blocks"
        staging = shared.staging
    heads = [(x.num_heads, x.num_kv_heads) for x in model.layers]
    return CrushKVCache(
        store, heads, staging, max_prefixes, scheduler.max_num_batched_tokens, _prefix_limit(scheduler, cache, store),
        pages_prompts=model.pages_prompts, draft_rows=RECALL_ROWS if recall_of(cache) else BLOCK_SIZE,
    )  # fmt: skip


def _prefix_limit(scheduler: SchedulerConfig, cache: CacheConfig, store: native.Store) -> PrefixLimit | None:
    """What kept prefixes may hold: of a store whose size nobody chose they fill a part only, None = all of it."""
    if cache.prefix_bytes:
        return PrefixLimit(cache.prefix_bytes)
    if cache.max_bytes or scheduler.num_kv_blocks or scheduler.cache_size:
        return None
    return PrefixLimit(int(store.max_bytes * _PREFIX_SHARE), fewest=1)


def _make_store(model: LoadedModel, scheduler: SchedulerConfig, cache: CacheConfig) -> native.Store:
    def make(max_bytes: int) -> native.Store:
        return native.Store(
            layers=[layer.shape for layer in model.layers],
            key=cache.key_precision,
            value=cache.value_precision,
            recent=recent_precision(model, cache),
            recent_tokens=cache.recent_tokens,
            group_size=cache.group_size,
            max_bytes=max_bytes,
            recall_tokens=recall_of(cache),
        )

    measure = make(0)
    bytes_per_block = measure.bytes_for(BLOCK_SIZE)
    max_bytes = cache.max_bytes or _store_bytes(scheduler, measure)
    measure.close()
    if max_bytes < bytes_per_block:
        raise OutOfMemory(f"max_bytes must be at least {bytes_per_block}, as a short request takes, got {max_bytes}")
    return make(max_bytes)


def _paged_blocks(config: SchedulerConfig, bytes_per_block: int) -> int:
    if config.num_kv_blocks:
        return config.num_kv_blocks
    wanted = _cache_bytes(config)
    if wanted < bytes_per_block:
        raise OutOfMemory(
            f"cache_size must be at least one block of {BLOCK_SIZE} tokens, {bytes_per_block} bytes, got {wanted} bytes"
        )
    return wanted // bytes_per_block


def _store_bytes(config: SchedulerConfig, store: native.Store) -> int:
    """The limit of a store that is given none: what as many tokens as num_kv_blocks have take, else cache_size."""
    if config.num_kv_blocks:
        return store.bytes_for(config.num_kv_blocks * BLOCK_SIZE)
    return _cache_bytes(config)


def _cache_bytes(config: SchedulerConfig) -> int:
    """cache_size, or half of the free memory."""
    return int(config.cache_size * (1 << 30)) or int(free_memory_bytes() * _FREE_MEMORY_SHARE)


def _staging_blocks(config: CacheConfig, context_length: int | None, bytes_per_block: int) -> int:
    if config.staging_bytes:
        if config.staging_bytes < bytes_per_block:
            raise CrushError(
                f"staging_bytes must be at least one block of {BLOCK_SIZE} tokens, {bytes_per_block} bytes, "
                f"got {config.staging_bytes}"
            )
        return config.staging_bytes // bytes_per_block
    tokens = max(context_length or 0, _STAGED_TOKENS)
    fitting = int(free_memory_bytes() * _STAGING_SHARE) // bytes_per_block
    return max(min(blocks_for(tokens), fitting), 1)
