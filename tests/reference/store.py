"""The store of the compressed KV cache in plain Python: the same operations as the native Store, one after the other.

A cached token is known by its position in the text; its index in a head is its place in the order of the tiles.
Heads are numbered through all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from reference.clusters import group_tiles
from reference.codec import (
    BITS,
    TILE,
    Array,
    Layer,
    encode_decode,
    must_list,
    num_recalled,
    num_target_tiles,
    tile_bytes,
    to_float,
)

Precisions = list[tuple[str, str]]  # of the keys and values of each head


@dataclass(frozen=True)
class Tiers:
    """The precisions of each tier of each head, the best first, and the tier of each kept token of each head."""

    ladders: list[Precisions]
    of: Sequence[Array]


@dataclass(eq=False)
class Tile:
    """Up to 32 tokens as they read back. Sequences that share a tile hold the same object."""

    num_bytes: int
    k: Array  # float32 (n, D)
    v: Array
    positions: Array  # int32 (n,)
    precision: tuple[str, str]  # of keys, of values
    listed: bool  # positions are stored one by one; else the first one and the gaps, in the header

    @property
    def is_full(self) -> bool:
        return len(self.positions) == TILE


@dataclass
class Head:
    """Tiles in order: those of the target precision, those of the recent one (full but the last), then empty ones."""

    layer: Layer
    tiles: list[Tile] = field(default_factory=list)
    num_target: int = 0
    num_empty: int = 0  # recent tiles that `reserve` got

    def tokens(self) -> tuple[Array, Array, Array]:
        """Keys and values (S, D) and positions (S,)."""
        none = np.zeros((0, self.layer.head_size), np.float32)
        return (
            np.concatenate([none, *(tile.k for tile in self.tiles)]),
            np.concatenate([none, *(tile.v for tile in self.tiles)]),
            np.concatenate([np.zeros(0, np.int32), *(tile.positions for tile in self.tiles)]),
        )

    @property
    def num_tokens(self) -> int:
        return sum(len(t.positions) for t in self.tiles)

    @property
    def open_tile(self) -> Tile | None:
        """The last tile if it has room."""
        return self.tiles[-1] if self.tiles and not self.tiles[-1].is_full else None


@dataclass
class Cached:
    """A sequence: its heads numbered through all layers, and 1 + the largest position that it ever held."""

    heads: list[Head]
    next_position: int = 0
    precisions: list[tuple[str, str]] = field(default_factory=list)  # of target tiles to come, of each head
    staged: list[tuple[Array, Array]] = field(default_factory=list)  # of each layer, float32 (n, K, D)


def arrange(positions: Array, tiers: Array, num_target: int) -> tuple[Array, list[int]]:
    """Tokens (n,) in the order of their tiles, and the best tier of each of the `num_target` first.

    The newest are last; before them 32 * num_target sorted by tier, in each tile by position.
    """
    order = np.argsort(positions, kind="stable")
    old, newest = order[: TILE * num_target], order[TILE * num_target :]
    old = old[np.argsort(tiers[old], kind="stable")].reshape(num_target, TILE)
    best = tiers[old].min(axis=1, initial=255).tolist()
    return np.concatenate([*(tile[np.argsort(positions[tile], kind="stable")] for tile in old), newest]), best


def lower(own: tuple[str, str], wanted: tuple[str, str]) -> tuple[str, str]:
    """For keys and values the one with fewer bits; the own one if they have as many."""
    key, value = (w if BITS[o] > BITS[w] else o for o, w in zip(own, wanted, strict=True))
    return key, value


class StoreFull(MemoryError):
    """The limit in bytes would be passed."""


class ReferenceStore:
    """The operations of the native Store, with the same tiles, values and bytes; no queries are captured."""

    def __init__(
        self,
        *,
        layers: Sequence[tuple[int, int, int, int, float]],
        key: str,
        value: str,
        recent: str,
        recent_tokens: int,
        group_size: int,
        max_bytes: int = 0,
        recall_tokens: float = 0,
    ) -> None:
        self.recall_tokens = recall_tokens
        self.layers = [Layer(*layer) for layer in layers]
        self.target, self.recent = (key, value), (recent, recent)
        self.recent_tokens, self.group_size, self.max_bytes = recent_tokens, group_size, max_bytes
        self._sequences: dict[int, Cached] = {}
        self._last_id = 0

    # Bytes and tokens.

    @property
    def num_sequences(self) -> int:
        return len(self._sequences)

    @property
    def nbytes(self) -> int:
        """Bytes of all tiles, each counted once."""
        return self._bytes_of(head for seq in self._sequences.values() for head in seq.heads)

    def nbytes_of(self, seq: int) -> int:
        return self._bytes_of(self._sequences[seq].heads)

    @property
    def heads(self) -> list[Layer]:
        """The layer of each head."""
        return [layer for layer in self.layers for _ in range(layer.num_kv_heads)]

    def bytes_for(self, num_tokens: int | Sequence[int], precisions: Precisions | None = None) -> int:
        """Bytes of a sequence that adopts so many tokens in every head, or in each, without tiles that list."""
        numbers = [num_tokens] * len(self.heads) if isinstance(num_tokens, int) else num_tokens
        num_bytes = 0
        for layer, n, pair in zip(self.heads, numbers, precisions or self._defaults(), strict=True):
            num_target = num_target_tiles(n, self.recent_tokens)
            num_recent = -(-(n - TILE * num_target) // TILE)
            num_bytes += num_target * self._bytes(layer, pair, self._groups(layer, n))
            num_bytes += num_recent * self._bytes(layer, self.recent)
        return num_bytes

    def tokens(self, seq: int, layer: int, head: int) -> tuple[Array, Array, Array]:
        """Keys and values (S, D) and positions (S,) of a KV head."""
        return self._heads(seq, layer)[head].tokens()

    def free_slots(self, seq: int) -> int:
        """Tokens that can be appended to every head without a reserve."""
        return min(self._free_slots(head, self._sequences[seq].next_position) for head in self._sequences[seq].heads)

    def next_position(self, seq: int) -> int:
        """1 + the largest position that the sequence ever held."""
        return self._sequences[seq].next_position

    # Life of a sequence.

    def create(self, precisions: Precisions | None = None) -> int:
        return self._add(Cached([Head(layer) for layer in self.heads], precisions=precisions or self._defaults()))

    def set_precisions(self, seq: int, precisions: Precisions) -> None:
        self._sequences[seq].precisions = list(precisions)

    def precisions(self, seq: int) -> Precisions:
        return self._sequences[seq].precisions

    def release(self, seq: int) -> None:
        del self._sequences[seq]

    def fork(self, seq: int, num_tokens: int | None = None) -> int:
        """A twin that shares the tiles that hold tokens; with `num_tokens`, one of positions 0..num_tokens - 1 only."""
        source = self._sequences[seq]
        if source.staged:
            raise ValueError("seq must not be staged")
        heads = [Head(h.layer, list(h.tiles), h.num_target) for h in source.heads]
        twin = Cached(heads, source.next_position, source.precisions)
        if num_tokens is not None:
            orders = [head.tokens()[2] for head in heads]
            for positions in orders:
                found = np.sort(positions) if self.recall_tokens else positions
                if len(positions) < num_tokens or (found != np.arange(len(positions))).any():
                    raise ValueError("num_tokens must be a number of tokens of which every head holds all")
            if all((positions == np.arange(len(positions))).all() for positions in orders):
                for head in heads:
                    self._cut(head, num_tokens)
            else:
                kept = [np.flatnonzero(positions < num_tokens) for positions in orders]
                ladders = [[pair] for pair in twin.precisions]
                parts = zip(heads, kept, ladders, strict=True)
                twin.heads = [self._compacted(*part, None)[0] for part in parts]
            twin.next_position = num_tokens
        self._check_room(self._bytes_of([h for s in (*self._sequences.values(), twin) for h in s.heads]) - self.nbytes)
        return self._add(twin)

    def reserve(self, seq: int, num_tokens: int, keep_free: int = 0) -> bool:
        """Make room for `num_tokens` more tokens in every head, all or nothing."""
        cached = self._sequences[seq]
        return num_tokens == 0 or self._reserve(cached.heads, num_tokens, cached.next_position, keep_free)

    def append(self, seq: int, layer: int, k: Array, v: Array, first_position: int) -> None:
        """Append rows k, v (T, K * D) at positions first_position.. to a layer for which there is room."""
        heads, n = self._heads(seq, layer), len(k)
        if any(self._room(head) < n for head in heads):
            raise RuntimeError("append needs a reserve before it")
        if n and not self._reserve(heads, n, first_position):
            raise StoreFull("max_bytes would be passed")
        positions = np.arange(first_position, first_position + n, dtype=np.int32)
        for i, head in enumerate(heads):
            part = slice(i * head.layer.head_size, (i + 1) * head.layer.head_size)
            self._append(head, to_float(k[:, part], self.recent[0]), to_float(v[:, part], self.recent[1]), positions)
        self._sequences[seq].next_position = max(self._sequences[seq].next_position, first_position + n)

    def crop(self, seq: int, num_tokens: int) -> None:
        """Take back the last tokens, at positions from num_tokens on, none of them settled or in a shared tile."""
        cached = self._sequences[seq]
        if num_tokens >= cached.next_position:
            return
        plans = []
        for head in cached.heads:
            stay = head.num_tokens
            positions = head.tokens()[2]
            while stay > TILE * head.num_target and positions[stay - 1] >= num_tokens:
                stay -= 1
            changed = head.tiles[stay // TILE :] if stay < head.num_tokens else []
            if (positions[:stay] >= num_tokens).any() or any(self._is_shared(tile) for tile in changed):
                raise ValueError("num_tokens must leave what has settled or is shared")
            plans.append(stay)
        for head, stay in zip(cached.heads, plans, strict=True):
            tiles, head.num_empty = head.tiles, 0
            head.tiles = tiles[: -(-stay // TILE)]
            rest = stay % TILE
            if rest and stay < sum(len(tile.positions) for tile in tiles):
                last = head.tiles[-1]
                cut = (last.k[:rest], last.v[:rest], last.positions[:rest])
                head.tiles[-1] = replace(last, k=cut[0], v=cut[1], positions=cut[2])
        cached.next_position = num_tokens

    def quantize_aged(self, seq: int) -> bool:
        """Move what left the recent window of each head into tiles of the target precision; without room it waits.

        Return whether nothing waits, whatever the order of heads in which it was done.
        """
        growth = 0
        free = self.max_bytes - self.nbytes if self.max_bytes else 2**63
        for head, target in zip(self._sequences[seq].heads, self._sequences[seq].precisions, strict=True):
            change = self._quantize_grouped(head, target)
            growth += max(0, change)
            while head.num_target < num_target_tiles(head.num_tokens, self.recent_tokens):
                old = head.tiles[head.num_target]
                if target != self.recent:
                    new = self._tile(head.layer, target, old.k, old.v, old.positions)
                    change = new.num_bytes - (0 if self._is_shared(old) else old.num_bytes)
                    growth += max(0, change)
                    if not self._fits(change):
                        break
                    head.tiles[head.num_target] = new
                head.num_target += 1
        return growth <= free

    def _quantize_grouped(self, head: Head, target: tuple[str, str]) -> int:
        """Tiles that are due, grouped by their keys if there are several and all of them fit. Return their growth."""
        end = num_target_tiles(head.num_tokens, self.recent_tokens)
        begin, num_due = head.num_target, end - head.num_target
        if target == self.recent or num_due < 2 or not self._groups(head.layer, head.num_tokens):
            return 0
        k, v, positions = (x[TILE * begin : TILE * end] for x in head.tokens())
        order = group_tiles(positions, np.zeros(len(k), np.uint8), k, num_due)
        new = self._tiles(head.layer, [target] * num_due, k[order], v[order], positions[order])
        freed = sum(0 if self._is_shared(tile) else tile.num_bytes for tile in head.tiles[begin:end])
        change = sum(tile.num_bytes for tile in new) - freed
        if not self._fits(change):
            return 0
        head.tiles[begin:end], head.num_target = new, end
        return change

    def attach_prefill(self, seq: int, tokens: list[tuple[Array, Array]]) -> None:
        """A prompt for `adopt`: keys and values (n, K * D) of each layer, as the staging blocks hold them."""
        self._sequences[seq].staged = [
            (k.reshape(len(k), layer.num_kv_heads, -1), v.reshape(len(v), layer.num_kv_heads, -1))
            for layer, (k, v) in zip(self.layers, tokens, strict=True)
        ]

    def commit_prefill(
        self,
        seq: int,
        kept: Sequence[Array] | None = None,
        keep_free: int = 0,
        precisions: Precisions | None = None,
        tiers: Tiers | None = None,
    ) -> None:
        """Take the staged tokens into an empty sequence, of each head all or the ones of these indices."""
        cached = self._sequences[seq]
        ladders = tiers.ladders if tiers else [[pair] for pair in precisions or cached.precisions]
        heads: list[Head] = []
        for layer, (k, v) in zip(self.layers, cached.staged, strict=True):
            for i in range(layer.num_kv_heads):
                index = np.arange(len(k)) if kept is None else kept[len(heads)]
                num_target = num_target_tiles(len(index), self.recent_tokens)
                head = Head(layer, [], num_target)
                targets = [ladders[len(heads)][0]] * num_target
                if tiers:
                    order, best = arrange(index, tiers.of[len(heads)], num_target)
                    index, targets = index[order], [ladders[len(heads)][tier] for tier in best]
                if self._groups(layer, len(index)):
                    of = tiers.of[len(heads)][order] if tiers else np.zeros(len(index), np.uint8)
                    index = index[group_tiles(index, of, k[index, i], num_target)]
                head.tiles = self._tiles(layer, targets, k[index, i], v[index, i], index.astype(np.int32))
                heads.append(head)
        self._check_room(self._bytes_of(heads) - self._bytes_of(cached.heads), keep_free)
        next_position = max(cached.next_position, len(cached.staged[0][0]))
        self._sequences[seq] = Cached(heads, next_position, [ladder[0] for ladder in ladders])

    def compact(
        self, seq: int, kept: Sequence[Array], precisions: Precisions | None = None, tiers: Tiers | None = None
    ) -> Array:
        """Keep the cached tokens of these indices of each head; return for each new index the old one, flat.

        Full target tiles of which all 32 stay come first, written again only if they have more bits than the
        precisions. The other kept tokens follow in their order: as many full target tiles as the rule asks for, the
        rest in recent tiles. With tiers, only tiles whose tokens are of one tier are whole, and the others' tokens are
        sorted by tier.
        """
        cached = self._sequences[seq]
        ladders = tiers.ladders if tiers else [[pair] for pair in precisions or cached.precisions]
        of = tiers.of if tiers else [None] * len(kept)
        pairs = [self._compacted(*head) for head in zip(cached.heads, kept, ladders, of, strict=True)]
        others = [s.heads for i, s in self._sequences.items() if i != seq]
        after = self._bytes_of([*(head for head, _ in pairs), *(head for heads in others for head in heads)])
        self._check_room(after - self.nbytes)
        cached.heads, cached.precisions = [head for head, _ in pairs], [x[0] for x in ladders]
        return np.concatenate([order for _, order in pairs]).astype(np.int32)

    # Inside.

    def _defaults(self) -> Precisions:
        return [self.target] * len(self.heads)

    def _add(self, cached: Cached) -> int:
        self._last_id += 1
        self._sequences[self._last_id] = cached
        return self._last_id

    def _heads(self, seq: int, layer: int) -> list[Head]:
        begin = sum(shape.num_kv_heads for shape in self.layers[:layer])
        return self._sequences[seq].heads[begin : begin + self.layers[layer].num_kv_heads]

    def _bytes(self, layer: Layer, precision: tuple[str, str], listed: bool = False) -> int:
        group_size = math.gcd(self.group_size, layer.head_size)
        return tile_bytes(*precision, layer.head_size, group_size, listed, with_mean=self.recall_tokens > 0)

    def _groups(self, layer: Layer, num_tokens: int) -> bool:
        """Whether so many tokens of a head are put into tiles by their keys."""
        asked = num_target_tiles(num_tokens, self.recent_tokens) - 1
        return self.recall_tokens > 0 and not layer.window and asked > num_recalled(self.recall_tokens, num_tokens)

    def _bytes_of(self, heads: Iterable[Head]) -> int:
        heads = list(heads)
        num_empty = sum(head.num_empty * self._bytes(head.layer, self.recent) for head in heads)
        return num_empty + sum(tile.num_bytes for tile in {id(t): t for head in heads for t in head.tiles}.values())

    def _fits(self, num_bytes: int, keep_free: int = 0) -> bool:
        return not self.max_bytes or num_bytes <= 0 or self.nbytes + num_bytes <= self.max_bytes - keep_free

    def _check_room(self, num_bytes: int, keep_free: int = 0) -> None:
        if not self._fits(num_bytes, keep_free):
            raise StoreFull(f"max_bytes must be at least {self.nbytes + num_bytes + keep_free}, got {self.max_bytes}")

    def _is_shared(self, tile: Tile) -> bool:
        return sum(t is tile for seq in self._sequences.values() for head in seq.heads for t in head.tiles) > 1

    def _tile(self, layer: Layer, precision: tuple[str, str], k: Array, v: Array, positions: Array) -> Tile:
        """A new tile, listed if its positions must be."""
        listed = must_list(positions)
        back = encode_decode(*precision, math.gcd(self.group_size, layer.head_size), k, v)
        return Tile(self._bytes(layer, precision, listed), *back, positions, precision, listed)

    def _tiles(self, layer: Layer, targets: Precisions, k: Array, v: Array, positions: Array) -> list[Tile]:
        """New tiles: the first ones of the precisions `targets`, the rest of the recent one."""
        parts = [slice(begin, begin + TILE) for begin in range(0, len(positions), TILE)]
        precisions = [*targets, *[self.recent] * (len(parts) - len(targets))]
        return [
            self._tile(layer, p, k[part], v[part], positions[part]) for p, part in zip(precisions, parts, strict=True)
        ]

    def _free_slots(self, head: Head, position: int) -> int:
        """Tokens that can be appended from `position` on without a new tile."""
        tile = head.open_tile
        return 0 if tile is not None and self._listed(tile, position) != tile.listed else self._room(head)

    @staticmethod
    def _listed(tile: Tile, position: int) -> bool:
        """Whether the positions of a tile are listed when it has taken another one."""
        return tile.listed or must_list(np.append(tile.positions, position))

    def _room(self, head: Head) -> int:
        """Slots behind the tokens; none while the last tile is another sequence's too."""
        tile = head.open_tile
        if tile is None:
            return TILE * head.num_empty
        return 0 if self._is_shared(tile) else TILE * head.num_empty + TILE - len(tile.positions)

    def _reserve(self, heads: Sequence[Head], num_tokens: int, position: int, keep_free: int = 0) -> bool:
        """New tiles and open tiles that are ours alone and can go on at `position`: listed if they must be."""
        opened: list[tuple[Head, Tile]] = []
        missing: list[tuple[Head, int]] = []
        num_bytes = 0
        for head in heads:
            tile = head.open_tile
            if tile is not None:
                listed = self._listed(tile, position)
                if listed != tile.listed or self._is_shared(tile):
                    copy = replace(tile, listed=listed, num_bytes=self._bytes(head.layer, self.recent, listed))
                    opened.append((head, copy))
                    num_bytes += copy.num_bytes - (0 if self._is_shared(tile) else tile.num_bytes)
            needed = -(-(head.num_tokens + num_tokens) // TILE) - len(head.tiles) - head.num_empty
            missing.append((head, max(0, needed)))
            num_bytes += max(0, needed) * self._bytes(head.layer, self.recent)
        if not self._fits(num_bytes, keep_free):
            return False
        for head, copy in opened:
            head.tiles[-1] = copy
        for head, needed in missing:
            head.num_empty += needed
        return True

    def _append(self, head: Head, k: Array, v: Array, positions: Array) -> None:
        """Tokens as they read back, into the open tile and then into empty ones."""
        begin = 0
        tile = head.open_tile
        if tile is not None:
            begin = min(len(k), TILE - len(tile.positions))
            tile.k, tile.v = np.concatenate([tile.k, k[:begin]]), np.concatenate([tile.v, v[:begin]])
            tile.positions = np.concatenate([tile.positions, positions[:begin]])
        for i in range(begin, len(k), TILE):
            part = slice(i, i + TILE)
            head.num_empty -= 1
            num_bytes = self._bytes(head.layer, self.recent)
            head.tiles.append(Tile(num_bytes, k[part].copy(), v[part].copy(), positions[part], self.recent, False))

    def _cut(self, head: Head, num_tokens: int) -> None:
        """Keep the first tokens; a tile that is cut becomes one of the recent precision."""
        whole = num_tokens // TILE
        k, v, positions = (x[TILE * whole : num_tokens] for x in head.tokens())
        if len(positions) and (whole == len(head.tiles) - 1 and len(positions) == len(head.tiles[-1].positions)):
            return  # the open tile stays whole
        head.tiles = head.tiles[:whole]
        head.num_target = min(head.num_target, whole)
        if len(positions):
            head.tiles.append(self._tile(head.layer, self.recent, k, v, positions))

    def _compacted(self, head: Head, kept: Array, ladder: Precisions, tiers: Array | None) -> tuple[Head, Array]:
        """The head with the kept tokens only, and their old indices."""
        tier_of = dict(zip(kept.tolist(), [0] * len(kept) if tiers is None else tiers.tolist(), strict=True))
        of_tiles = [{tier_of.get(t) for t in range(TILE * i, TILE * i + TILE)} for i in range(head.num_target)]
        whole = {i: ladder[min(tier)] for i, tier in enumerate(of_tiles) if len(tier) == 1 and None not in tier}
        fitting = [
            i for i, target in whole.items() if lower(head.tiles[i].precision, target) == head.tiles[i].precision
        ]
        if len(kept) == head.num_tokens and len(fitting) == head.num_target:
            return head, kept
        rest = kept[~np.isin(kept // TILE, list(whole))]
        num_target = max(len(whole), num_target_tiles(len(kept), self.recent_tokens))
        targets = [ladder[0]] * (num_target - len(whole))
        groups = self._groups(head.layer, len(kept))
        if tiers is not None or groups:
            of_rest = np.array([tier_of[int(t)] for t in rest], np.uint8)
            order, best = arrange(head.tokens()[2][rest], of_rest, len(targets))
            rest, of_rest, targets = rest[order], of_rest[order], [ladder[tier] for tier in best]
        if groups:
            k, _, positions = head.tokens()
            rest = rest[group_tiles(positions[rest], of_rest, k[rest], len(targets))]
        tiles = [self._lowered(head.layer, head.tiles[i], target) for i, target in whole.items()]
        k, v, positions = (x[rest] for x in head.tokens())
        for i, new in enumerate(self._tiles(head.layer, targets, k, v, positions)):
            own = self._recent_tile(head, rest[TILE * i : TILE * (i + 1)]) if new.precision == self.recent else None
            tiles.append(own or new)
        order = np.concatenate([*(np.arange(TILE * i, TILE * i + TILE) for i in whole), rest])
        return Head(head.layer, tiles, num_target), order

    def _lowered(self, layer: Layer, tile: Tile, target: tuple[str, str]) -> Tile:
        """The tile itself, or, if it has more bits than `target`, its tokens with as many."""
        precision = lower(tile.precision, target)
        return tile if precision == tile.precision else self._tile(layer, precision, tile.k, tile.v, tile.positions)

    def _recent_tile(self, head: Head, index: Array) -> Tile | None:
        """The recent tile that holds exactly these cached tokens, if there is one."""
        i = int(index[0]) // TILE
        own = np.arange(TILE * i, TILE * i + len(head.tiles[i].positions))
        return head.tiles[i] if i >= head.num_target and np.array_equal(index, own) else None
