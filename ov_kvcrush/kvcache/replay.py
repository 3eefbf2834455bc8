"""The second reading of a staged prompt: its chunks again, one after the other, behind an instruction to repeat them.

Each chunk has a reader, a sequence of its own on the prompt's staging blocks: what it sees of the prompt comes first
in its block table, its own rows follow on blocks that the next reader writes over. KVzip, arXiv 2505.23416, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

import numpy as np

from ov_kvcrush.core.eviction import PerHead, ReplayPrompt
from ov_kvcrush.core.growable import GrowableArray
from ov_kvcrush.core.request import Sequence
from ov_kvcrush.kvcache.attention_plan import MAX_OF_ROWS
from ov_kvcrush.kvcache.block_pool import BLOCK_SIZE, blocks_for
from ov_kvcrush.kvcache.eviction import split_heads
from ov_kvcrush.policies.base import Replay

ROWS = 512  # of one step: their queries are held for all layers
REMINDER = 8  # tokens before a chunk that its instruction names


def replay_blocks(replay: Replay, prompt: ReplayPrompt, num_tokens: int) -> int:
    """Blocks that the readers of a prompt need beside its own."""
    chunk = min(blocks_for(replay.chunk) * BLOCK_SIZE, num_tokens)
    asked = max(len(prompt.first), len(prompt.again) + REMINDER) + len(prompt.answer)
    return blocks_for(chunk + asked) + 1


class Reader(Sequence):
    """The rows of one chunk's repetition, or of its first tokens'.

    seen: positions of the tokens at the front of its block table. chunk: [begin, end) of what is repeated.
    blocks: int32, its block table.
    """

    score_reduction = MAX_OF_ROWS

    def __init__(
        self, parent: Sequence, ids: np.ndarray, seen: np.ndarray, chunk: tuple[int, int], blocks: np.ndarray
    ) -> None:
        super().__init__(parent.request, parent.index, GrowableArray(np.int64, ids))
        self.replays = parent
        self.num_cached = len(seen)
        self.position_offset = parent.num_cached - len(seen)
        self.chunk = chunk
        self.chunk_at = int(np.searchsorted(seen, chunk[0]))  # where the chunk begins in the table
        self.blocks = blocks
        self.scores: PerHead | None = None

    @property
    def samples(self) -> bool:
        return False

    def take_scores(self, scores: PerHead) -> None:
        """Note the scores of one step; of several, each token keeps its largest."""
        begin, end = self.chunk_at, self.chunk_at + self.chunk[1] - self.chunk[0]
        new = [[head[:, begin:end] for head in layer] for layer in scores]
        if self.scores is None:
            self.scores = [[head.copy() for head in layer] for layer in new]
            return
        for mine, others in zip(self.scores, new, strict=True):
            for head, other in zip(mine, others, strict=True):
                np.maximum(head, other, out=head)


class ReplayState:
    """The readers of one prompt, one at a time, and what they have seen so far.

    What stays at the prompt's front in any case, such as a system prompt, is seen but not read again.
    blocks: int32, those of the prompt. own_blocks: int32, for the readers' own rows.
    """

    def __init__(self, parent: Sequence, blocks: np.ndarray, own_blocks: np.ndarray) -> None:
        eviction = parent.request.replayer
        assert eviction is not None, "a replay that nobody asked for"
        assert eviction.policy.inputs.replay is not None
        self._parent = parent
        self._replay = eviction.policy.inputs.replay
        self._prompt = eviction.replay_prompt
        self._blocks = blocks
        self.own_blocks = own_blocks
        self._head = eviction.head
        self._chunks = self._cut(len(parent.ids))
        self._total = sum(end - begin for begin, end, _ in self._cut(len(parent.ids)))
        self._done = 0
        self._found: PerHead | None = None
        self.reader: Reader | None = None

    @property
    def progress(self) -> tuple[int, int]:
        """Tokens of the prompt that were read again, and all that are to be."""
        done = self._done
        if self.reader is not None:
            begin, end = self.reader.chunk
            done += max(end - begin - self.reader.num_pending, 0)
        return done, self._total

    @property
    def scores(self) -> PerHead:
        """[layer][KV head] float32 (G, S): the largest attention of any reader's row, as HeadState has it."""
        assert self._found is not None, "scores of a replay without readers"
        return self._found

    def _cut(self, length: int) -> Iterator[tuple[int, int, int]]:
        """Begin, end of what is repeated, and end of each chunk of a text of `length`: they end at blocks."""
        size = blocks_for(self._replay.chunk) * BLOCK_SIZE
        begin = self._head
        while begin < length:
            end = min((begin // BLOCK_SIZE) * BLOCK_SIZE + size, length)
            yield begin, begin + math.ceil(self._replay.sample * (end - begin)), end
            begin = end

    def advance(self) -> bool:
        """Take what the reader found, and make the next one; False if there is none."""
        if self.reader is not None:
            self._take(self.reader)
        chunk = next(self._chunks, None)
        self.reader = None if chunk is None else self._make(*chunk)
        return self.reader is not None

    def _make(self, begin: int, repeated: int, end: int) -> Reader:
        parent, prompt = self._parent, self._prompt
        length = parent.num_cached
        if self._replay.sees == "all":
            blocks = np.arange(blocks_for(length))
        else:
            head_blocks = max(1, blocks_for(self._head))
            blocks = np.union1d(np.arange(head_blocks), np.arange(begin // BLOCK_SIZE, blocks_for(end)))
        seen = (blocks[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).ravel()
        seen = seen[seen < length]
        ids = parent.ids[:]
        ask = [prompt.first] if begin == self._head else [prompt.again, ids[max(begin - REMINDER, 0) : begin]]
        rows = np.concatenate([ids[seen], *ask, prompt.answer, ids[begin:repeated]])
        own = self.own_blocks[: blocks_for(len(rows)) - len(blocks)]
        return Reader(parent, rows, seen, (begin, repeated), np.concatenate([self._blocks[blocks], own]))

    def _take(self, reader: Reader) -> None:
        assert reader.scores is not None, "a reader without rows"
        if self._found is None:
            length = self._parent.num_cached
            self._found = [[np.full((len(x), length), np.nan, np.float32) for x in layer] for layer in reader.scores]
            for layer in self._found:
                for head in layer:
                    head[:, : self._head] = 0
        begin, end = reader.chunk
        self._done += end - begin
        for found, scores in zip(self._found, reader.scores, strict=True):
            for head, values in zip(found, scores, strict=True):
                head[:, begin:end] = values


def hand_out_scores(
    readers: Items[Reader], heads: Items[tuple[int, int]], scores: Callable[[], list[np.ndarray]]
) -> None:
    """Give each reader the attention scores of its rows in a step. readers: in the order of the step, all staged.

    heads: (H, K) of each layer. scores: of each layer, flat.
    """
    if not readers:
        return
    found: list[PerHead] = [[] for _ in readers]
    for (num_heads, num_kv_heads), flat in zip(heads, scores(), strict=True):
        lengths = [reader.num_cached for reader in readers for _ in range(num_kv_heads)]
        of_heads = [x.copy() for x in split_heads(flat, num_heads // num_kv_heads, lengths)]
        for index, of_reader in enumerate(found):
            of_reader.append(of_heads[index * num_kv_heads : (index + 1) * num_kv_heads])
    for reader, of_reader in zip(readers, found, strict=True):
        reader.take_scores(of_reader)
