"""Help for the tests of the native module: a store, prompts staged for it, and what attention over it must give."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ov_kvcrush import native
from reference import codec as reference

Array = npt.NDArray[Any]
Span = tuple[int, int, int, int]  # sequence, first row, number of rows, position of the first row
LayerTuple = (
    tuple[int, int, int, int, float] | tuple[int, int, int, int, float, float, Sequence[float], Sequence[float]]
)

PRECISIONS = ["f32", "bf16", "f16", "u8", "u4", "u2"]
DEFAULTS: dict[str, Any] = {"key": "u8", "value": "u8", "recent": "bf16", "recent_tokens": 32, "group_size": 32}
DIGITS_ERROR = 2.6e-5  # 5 standard deviations of a logit, by its largest |q_c| range_c and the square root of D
# Powers of prompts are rounded to bf16, 2^-9 of each at most; so is what they sum to, in units of the values.
PREFILL_BOUND = 2**-8
ISAS: list[str] = list(native.info()["isas"]) if native.available() else ["not built"]
# Kernels that read prompts: of those that this CPU has, and for AVX-512 the one with emulated products.
BF16_EMULATED = "avx512bf16-emulated"


def require_native() -> None:
    """Fail, never skip: without the module nothing is tested."""
    assert native.available(), f"the native module is not built: {native.why_unavailable()}"


def layer(num_heads: int = 4, num_kv_heads: int = 2, head_size: int = 32, window: int = 0) -> LayerTuple:
    return (num_heads, num_kv_heads, head_size, window, head_size**-0.5)


PREFILL_ISAS = [
    isa
    for isa in (*ISAS, *([BF16_EMULATED] if "avx512" in ISAS else []))
    if native.available() and native.can_prefill([layer()], "bf16", isa)
]


def gaussian(rng: np.random.Generator, *shape: int) -> Array:
    return rng.normal(size=shape).astype(np.float32)


def keys_values(rng: np.random.Generator, num_tokens: int, width: int) -> tuple[Array, Array]:
    """Keys whose channels have a mean of their own, as real ones have, and values: float32 (num_tokens, width)."""
    return gaussian(rng, num_tokens, width) + 2 * gaussian(rng, 1, width), gaussian(rng, num_tokens, width)


def flat(kept: list[Array]) -> tuple[Array, Array]:
    """A selection as the native store takes it: offsets of the heads and indices."""
    return np.cumsum([0, *map(len, kept)]).astype(np.int64), np.concatenate(kept).astype(np.int32)


def some_precisions(rng: np.random.Generator, num_heads: int) -> Array:
    """A pair of codecs for each head: uint8 (num_heads, 2)."""
    return rng.integers(0, len(PRECISIONS), (num_heads, 2), dtype=np.uint8)


def some_ladders(rng: np.random.Generator, num_heads: int, num_tiers: int) -> Array:
    """Pairs of codecs for each tier of each head, the most bits first: uint8 (num_heads, num_tiers, 2)."""
    ladders = rng.integers(0, len(PRECISIONS), (num_heads, num_tiers, 2), dtype=np.uint8)
    bits = np.array([reference.BITS[name] for name in PRECISIONS])[ladders]
    return np.take_along_axis(ladders, np.argsort(-bits, axis=1), axis=1)


def names_of(precisions: Array) -> list[tuple[str, str]]:
    """Precisions uint8 (heads, 2) as the reference store takes them."""
    return [(PRECISIONS[key], PRECISIONS[value]) for key, value in precisions]


def as_bytes(x: Array, precision: str) -> Array:
    """Float32 `x` as the bytes of a staging tensor: uint8 (num_bytes,)."""
    x = np.ascontiguousarray(reference.to_float(x, precision))
    if precision == "bf16":
        return (x.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)
    return x.astype(np.float16 if precision == "f16" else np.float32).reshape(-1).view(np.uint8)


class Cache:
    """A native store with its layers, and the attention over what it reads back as the reference computes it."""

    def __init__(self, *layers: LayerTuple, **options: Any) -> None:
        require_native()
        options = {**DEFAULTS, **options}
        self.key, self.value, self.group_size = options["key"], options["value"], options["group_size"]
        self.store = native.Store(layers=list(layers), **options)
        self.layers = [reference.Layer(*shape) for shape in layers]
        self.num_heads = sum(shape.num_kv_heads for shape in self.layers)

    def new(self, rng: np.random.Generator, num_tokens: int, settle: bool = True) -> int:
        """A sequence of random tokens at positions 0.., the old ones in the target precision if `settle`."""
        seq: int = self.store.create()
        self.append(seq, rng, num_tokens, 0)
        if settle:
            self.store.quantize_aged(seq)
        return seq

    def append(self, seq: int, rng: np.random.Generator, num_tokens: int, first_position: int) -> None:
        assert self.store.reserve(seq, num_tokens)
        if num_tokens == 0:
            return
        for index, shape in enumerate(self.layers):
            tokens = keys_values(rng, num_tokens, shape.num_kv_heads * shape.head_size)
            self.store.append(seq, index, *tokens, first_position)

    def attach_prefill(self, seq: int, prompt: Sequence[tuple[Array, Array]], precision: str = "f32") -> None:
        """Stage a prompt, keys and values (n, K * D) of each layer, in blocks out of order among others of NaN."""
        num_tokens = len(prompt[0][0])
        num_blocks = -(-num_tokens // reference.TILE)
        table = np.random.default_rng(num_tokens).permutation(num_blocks + 2)[:num_blocks].astype(np.int32)
        for index, (shape, tokens) in enumerate(zip(self.layers, prompt, strict=True)):
            keys, values = (as_bytes(in_blocks(x, shape, table), precision) for x in tokens)
            self.store.set_staging(index, keys, values, num_blocks + 2, precision)
        self.store.attach_prefill(seq, table, num_tokens)

    def attention(self, index: int, spans: Sequence[Span], q: Array) -> Array:
        """What `attend` must give: float32 (T, H * D), zeros for rows of no span."""
        shape = self.layers[index]
        rows = q.reshape(len(q), shape.num_heads, shape.head_size)
        out = np.zeros(rows.shape)
        for seq, begin, num_rows, first in spans:
            at = np.arange(first, first + num_rows)
            for h in range(shape.num_heads):
                k, v, positions = self.tokens(seq, index, h * shape.num_kv_heads // shape.num_heads)
                span = slice(begin, begin + num_rows)
                p = reference.probabilities(shape, h, rows[span, h], k, positions, at)
                out[span, h] = p @ v.astype(np.float64)
        return out.reshape(q.shape).astype(np.float32)

    def rounding(self, index: int, spans: Sequence[Span], q: Array) -> float:
        """How far `attend` may be off because scaled queries are 16-bit integers, as docs/kv_store.md says.

        Five standard deviations of a logit's error, at the largest value. Scalar kernels round nothing.
        """
        if self.store.isa == "scalar":
            return 0.0
        shape = self.layers[index]
        rows = np.abs(q.reshape(len(q), shape.num_heads, shape.head_size))
        most = 0.0
        for seq, begin, num_rows, _ in spans:
            for h in range(shape.num_heads):
                k, v, _ = self.tokens(seq, index, h * shape.num_kv_heads // shape.num_heads)
                if len(k):
                    span = float((rows[begin : begin + num_rows, h] * np.ptp(k, axis=0)).max()) * shape.scale
                    most = max(most, span * float(np.abs(v).max()))
        return DIGITS_ERROR * float(np.sqrt(shape.head_size)) * most

    def scores(self, seq: int, index: int, q: Array, at: Array, how: str) -> Array:
        """What `scores` must give, from the tokens of the store: float32, flat."""
        heads = range(self.layers[index].num_kv_heads)
        return score_tokens(self.layers[index], [self.tokens(seq, index, h) for h in heads], q, at, how)

    def tokens(self, seq: int, index: int, head: int) -> tuple[Array, Array, Array]:
        """Keys, values (S, D) and positions (S,) as the store reads them back."""
        return (*self.store.read(seq, index, head), self.store.positions(seq, index, head))


def in_blocks(x: Array, shape: reference.Layer, table: Array) -> Array:
    """Tokens (n, K * D) as PagedAttention stages them: (blocks, K, 32, D), two too many; the rest is NaN."""
    blocks = np.full((len(table) + 2, shape.num_kv_heads, reference.TILE, shape.head_size), np.nan, np.float32)
    for i, block in enumerate(table):
        part = x[reference.TILE * i : reference.TILE * (i + 1)].reshape(-1, shape.num_kv_heads, shape.head_size)
        blocks[block, :, : len(part)] = part.transpose(1, 0, 2)
    return blocks


def score_tokens(
    shape: reference.Layer, heads: Sequence[tuple[Array, Array, Array]], q: Array, at: Array, how: str
) -> Array:
    """Scores of rows q (W, H * D) at positions `at`: for each KV head (G, S), flat, one after the other."""
    rows = q.reshape(len(q), shape.num_heads, shape.head_size)
    group = shape.num_heads // shape.num_kv_heads
    parts = [
        reference.reduce_rows(
            reference.probabilities(shape, group * h + g, rows[:, group * h + g], k, positions, at), how
        )
        for h, (k, _, positions) in enumerate(heads)
        for g in range(group)
    ]
    return np.concatenate(parts).astype(np.float32)


def stage_random(cache: Cache, rng: np.random.Generator, num_tokens: int, **options: Any) -> int:
    """A sequence with a random prompt in the staging blocks."""
    seq: int = cache.store.create(**options)
    shapes = [s.num_kv_heads * s.head_size for s in cache.layers]
    cache.attach_prefill(seq, [keys_values(rng, num_tokens, width) for width in shapes])
    return seq


def codecs_of(cache: Cache, seq: int) -> list[list[tuple[int, int]]]:
    """Codecs of the tiles of each head, as the dump has them: its records begin with them."""
    heads, tiles = cache.store.dump(seq)
    shapes = [shape for shape in cache.layers for _ in range(shape.num_kv_heads)]
    found, at = [], 0
    for shape, (num_tokens, _, num_bytes, *_) in zip(shapes, heads, strict=True):
        end, of_head = at + num_bytes, []
        for first in range(0, num_tokens, reference.TILE):
            count = min(reference.TILE, num_tokens - first)
            key, value, _, width = map(int, tiles[at : at + 4])
            of_head.append((key, value))
            at += (
                8
                + width * (count - 1)
                + payload(PRECISIONS[key], PRECISIONS[value], shape.head_size, count, cache.group_size)
            )
        assert at == end
        found.append(of_head)
    return found


def payload(key: str, value: str, head_size: int, count: int, group_size: int) -> int:
    """Bytes of a tile of `count` tokens in a dump."""
    num_bytes = head_size * count * (reference.BITS[key] + reference.BITS[value]) // 8
    if key in reference.QUANTISED:
        num_bytes += 4 * head_size
    if value in reference.QUANTISED:
        num_bytes += 4 * reference.TILE * (head_size // np.gcd(group_size, head_size))
    return int(num_bytes)
