"""Types of the compiled module (src/python/module.cpp).

Letters: H query heads, K KV heads, D channels of a head, S cached tokens of a head, T rows of a step, W scored rows.
Arrays must be contiguous and of the dtype given. Wrong values raise ValueError "<field> must be <rule>, got <value>".
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
UInt8 = npt.NDArray[np.uint8]
UInt16 = npt.NDArray[np.uint16]
_Layer = tuple[int, int, int, int, float] | tuple[int, int, int, int, float, float, Sequence[float], Sequence[float]]

class StoreFull(MemoryError):
    """`nbytes` would exceed `max_bytes`; nothing has changed. The text has the numbers."""

class Store:
    """Tokens of all KV heads of many sequences, in tiles of 32 tokens. Safe to call from any thread.

    `precisions`, wherever it is an argument: uint8 (KV heads of all layers, 2), the codecs of keys and values that
    tokens of each head are written in once they have left the recent window; codecs are the indices of
    `config.PRECISIONS`. None: those of the sequence, and of a new one those of the store.

    `tiers`: uint8 (len(indices),), the tier of each token that a selection keeps. `precisions` are then (KV heads of
    all layers, tiers, 2), the first tier with the most bits, and later tokens are written in those of the first. The
    newest tokens stay in recent tiles whatever their tier; the others are sorted by tier and cut into tiles of 32,
    which are of the tier of their best token. In a tile tokens are in the order of the text.
    """

    def __init__(
        self,
        *,
        layers: Sequence[_Layer],
        key: str,
        value: str,
        recent: str,
        recent_tokens: int,
        group_size: int,
        max_bytes: int = 0,
        isa: str = "",
        recall_tokens: float = 0,
    ) -> None:
        """layers: (H, K, D, sliding window in tokens or 0, softmax scale) each, and, where a model has that, (...,
        soft cap of scores or 0, ALiBi slopes (H,) or (), sinks (H,) or ()). Precisions: f32, bf16, f16, u8, u4, u2;
        the newest `recent_tokens` of a head stay in `recent`. group_size: channels that share a scale of the values.
        max_bytes: hard limit of `nbytes`, 0 = none. isa: kernels to use, "" = the best of this CPU.
        recall_tokens: tokens that steps of up to four rows read of a head, beside the tiles of the text's first four
        and the recent ones, or a fraction below 1 of what it holds; 0 = all. Then full tiles have the mean of their
        keys, and those of a prompt hold tokens whose keys are alike, where not all of them would be read."""

    @property
    def id(self) -> int:
        """Value of the graph input crush_store, until close() or garbage collection."""
    @property
    def isa(self) -> str: ...
    @property
    def nbytes(self) -> int:
        """Bytes of all tiles in use and of captured queries, each counted once."""
    @property
    def reserved_bytes(self) -> int:
        """Bytes that the slabs of the tiles take: at most 1.05 * max_bytes and 2 MiB for each size of tile, and while
        compact or quantize_aged run, what they replace beside it. Tiles move where twice their bytes are reserved."""
    @property
    def max_bytes(self) -> int: ...
    @property
    def num_sequences(self) -> int: ...
    def close(self) -> None: ...
    def create(self, capture_rows: int = 0, precisions: UInt8 | None = None) -> int:
        """A new sequence, which captures its last `capture_rows` query rows for scores."""
    def set_precisions(self, seq: int, precisions: UInt8) -> None:
        """Of all that is written from now on. Tiles that are there stay as they are; `compact` may change them."""
    def precisions(self, seq: int) -> UInt8:
        """(KV heads of all layers, 2)"""
    def release(self, seq: int) -> None: ...
    def fork(self, seq: int, num_tokens: int | None = None) -> int:
        """A new sequence that shares all tiles and captured queries. With num_tokens: only positions below it, without
        captured queries, and no head may have dropped any. Raises StoreFull."""
    def crop(self, seq: int, num_tokens: int) -> None:
        """Take back the tokens at positions from num_tokens on, and their captured queries, as if they had never been
        appended, but that queries that they took the place of are lost. Empty tiles are freed. ValueError, with nothing
        changed, where some have left the recent window or share a tile."""
    def reserve(self, seq: int, num_tokens: int, promised: int = 0) -> bool:
        """Slots for num_tokens more in every head, and room for their captured queries, all or nothing; False if nbytes
        would exceed max_bytes - promised."""
    def free_slots(self, seq: int) -> int:
        """Tokens that every head can take at the next position without another reserve."""
    def quantize_aged(self, seq: int) -> None:
        """Encode tokens that have left the recent window into tiles of the target precisions."""
    def set_staging(self, layer: int, keys: Array, values: Array, num_blocks: int, precision: str) -> None:
        """uint8 (bytes,), writable: blocks [num_blocks, K, 32, D] of f32, bf16 or f16, PagedAttention's cache where it
        reads prompts; held until replaced."""
    def attach_prefill(self, seq: int, blocks: Int32, num_tokens: int) -> None:
        """The prompt of an empty sequence lies in these staging blocks (n,)."""
    def commit_prefill(
        self,
        seq: int,
        offsets: Array | None = None,
        indices: Int32 | None = None,
        promised: int = 0,
        precisions: UInt8 | None = None,
        tiers: UInt8 | None = None,
    ) -> None:
        """Encode the staged tokens into tiles: all, or indices[offsets[h]:offsets[h + 1]] for head h, counted through
        all layers. offsets: int64 (heads + 1,). Raises StoreFull, and the sequence has its old precisions."""
    def compact(
        self,
        seq: int,
        offsets: Array,
        indices: Int32,
        precisions: UInt8 | None = None,
        tiers: UInt8 | None = None,
    ) -> Int32:
        """Keep these cached tokens, selected as for commit_prefill. Returns (len(indices),): the old cached index
        of each new one, head by head, since tiles that keep all tokens move to the front. Those of them that
        have more bits than the precisions, in keys or in values, are encoded anew; none gets more bits.
        With tiers, those stay whose tokens are all of one tier. Raises StoreFull, with nothing changed."""
    def append(self, seq: int, layer: int, k: Float32, v: Float32, first_position: int) -> None:
        """k, v (T, K * D) at positions first_position, ...; RuntimeError without a reserve before."""
    def dump(self, seq: int) -> tuple[Array, Array]:
        """What a sequence holds, for files: heads int64 (KV heads of all layers, 6), tiles uint8 (bytes,). Without
        reserved slots and captured queries. Same content, same bytes. Little endian. Columns of heads: tokens, target
        tiles, bytes, next position (the same for all), codecs of keys and values."""
    def load(self, heads: Array, tiles: Array, capture_rows: int = 0, promised: int = 0) -> int:
        """A new sequence from the dump of a store with the same layers, recent precision and group size, with the
        precisions of the dump. All of it is checked; the arrays may be read-only and mapped. Raises StoreFull."""
    def attend(self, layer: int, spans: list[tuple[int, int, int, int]], q: Float32) -> Float32:
        """q (T, H * D) to (T, H * D). Spans: (seq, first row, rows, position of the first row); other rows are 0."""
    def prefill(
        self, layer: int, spans: list[tuple[int, int, int, int]], q: Float32, k: Float32, v: Float32
    ) -> Float32:
        """Rows of staged prompts, spans as for attend: k, v (T, K * D) are written to the staging blocks, and q
        (T, H * D) attends to all of its prompt up to the row itself, giving (T, H * D)."""
    def recalled(self, layer: int, span: tuple[int, int, int, int], q: Float32) -> list[Int32]:
        """Numbers of the tiles that rows of q (T, H * D) read of each KV head, ascending; none: all of them."""
    def means(self, seq: int, layer: int, head: int) -> Float32:
        """Mean keys (tiles, D) of the tiles before the recent window, where there is recall."""
    def scores(self, seq: int, layer: int, q: Float32, positions: Int32, reduce: str) -> Float32:
        """q (W, H * D) at positions (W,): softmax of each query head over all tokens, reduced over the rows by "mean",
        "max" or "sum_squares". Flat: for each KV head (H / K, S). Of a staged sequence: over the staged tokens."""
    def set_capture(self, seq: int, capture_rows: int) -> None:
        """Set how many query rows are captured. A new number drops those captured so far."""
    def captured(self, seq: int, layer: int) -> tuple[Float32, Int32]:
        """The captured queries (W, H * D) and their positions (W,), oldest first."""
    def num_tokens(self, seq: int, layer: int, head: int) -> int: ...
    def positions(self, seq: int, layer: int, head: int) -> Int32:
        """(S,)"""
    def read(self, seq: int, layer: int, head: int) -> tuple[Float32, Float32]:
        """Keys and values (S, D) as the kernels see them."""
    def nbytes_of(self, seq: int) -> int:
        """Bytes of the tiles and captured queries that a sequence can reach, shared ones in full."""
    def capture_bytes(self, rows: int, seq: int | None = None) -> int:
        """Bytes of `rows` captured query rows, 65536 at most; with a sequence, those that it does not have for itself
        yet."""
    def nbytes_of_all(self, ids: list[int]) -> int:
        """Bytes of these sequences together: what several of them share counts once."""
    def nbytes_freed_by(self, ids: list[int]) -> int:
        """Bytes that `nbytes` shrinks by if all of these are released: what nobody else holds."""
    def bytes_for(self, num_tokens: int | Array, precisions: UInt8 | None = None) -> int:
        """Bytes of a sequence that commits num_tokens tokens of a prompt in every head, or int64 (KV heads of all
        layers,) in each, where no tile must list its positions. With precisions (heads, tiers, 2) num_tokens is int64
        (heads, tiers), and the newest tokens, those that stay in recent tiles, count in the first tier whatever theirs
        is: n - 32 * (max(0, n - recent_tokens) // 32) of n. So it is exact."""

class Product:
    """A product with compressed weights, or an MLP of three, for few rows; src/kernels/product.hpp. Safe to call from
    any thread; it does not change."""

    def __init__(
        self, weights: Sequence[tuple[int, UInt8, UInt16, UInt16]], activation: str = "silu", isa: str = ""
    ) -> None:
        """weights: (bits, codes, scales, zeros): bits 8 or 4; codes uint8 (N, K), or (N, K / 2) with the first of two
        in the low half; scales and zeros float16 (N, groups) as uint16: w = (code - zero) * scale. N is a multiple of
        16, a group has 16 inputs or a multiple of 32. One is x @ w.T; three, gate, up and down, are
        down(activation(gate(x)) * up(x)), with a multiple of 32 outputs of gate. activation: "silu" or "gelu_tanh".
        isa: kernels to use, "" = the best of this CPU. The arrays are copied."""
    @property
    def id(self) -> int:
        """Value of the attribute `product` of CrushProduct, until garbage collection."""
    @property
    def nbytes(self) -> int: ...
    @property
    def num_inputs(self) -> int: ...
    @property
    def num_outputs(self) -> int: ...
    def run(self, x: Float32) -> Float32:
        """x (M, K) to (M, N); a row's results do not depend on the others. A row with a number that is not finite gives
        NaN."""

def info() -> dict[str, Any]:
    """`isa` (kernels in use), `isas` (all that may be used, slowest first), `isa_cap` (OV_KVCRUSH_ISA, "" = none),
    `openvino` (version). Raises ValueError if OV_KVCRUSH_ISA is not scalar, avx2, avxvnni, avx512, avx512vnni,
    avx512bf16 or amx."""

def can_prefill(layers: Sequence[_Layer], staging: str, isa: str = "") -> bool:
    """Whether `Store.prefill` reads prompts of all these layers, so that they can do without PagedAttention: they are
    staged as bf16, and there is a kernel (avx512bf16 or amx; head sizes that are multiples of 32), or scores are
    capped, which PagedAttention cannot do.

    isa: kernels to use, "" = the best of this CPU. "avx512bf16-emulated" has the prompt kernel of avx512bf16, and all
    else of avx512, on any CPU with the latter: for tests, since its products are slow."""

def tile_bytes(
    key: str, value: str, head_size: int, group_size: int, listed: bool = False, with_mean: bool = False
) -> int: ...
def encode_decode(
    key: str, value: str, group_size: int, k: Float32, v: Float32, isa: str = ""
) -> tuple[Float32, Float32]:
    """k, v (n, D), n <= 32: one tile there and back."""

def draw_rows(
    rows: Sequence[Float32],
    params: Sequence[tuple[float, int, float, float, int, int]],
    isa: str = "",
    masks: Sequence[Int32] = ...,
) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """Tokens drawn from rows (V,) of logits, in parallel; see ov_kvcrush/engine/draw.py for parameters and results.

    masks: for each row the bits of its tokens, (words,), or an empty array where all may be drawn; () = for all rows.
    """
