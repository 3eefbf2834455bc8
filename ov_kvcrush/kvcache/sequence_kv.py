"""What a cache manager knows of one sequence."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ov_kvcrush.core.eviction import EvictionState
from ov_kvcrush.core.growable import GrowableArray
from ov_kvcrush.kvcache.replay import ReplayState


def _no_blocks() -> GrowableArray:
    return GrowableArray(np.int32)


@dataclass(eq=False)
class SequenceKV:
    """The KV of one sequence, from `allocate` to `free`.

    blocks: int32, in the order of tokens; of a prompt that is staged, or of a paged cache. store_id: of its tokens in
    the store. num_shared: of the blocks, the first, which are a StagedPrompt's, too. free_slots: tokens that can be
    appended there as it is. state: what policies left. replay: while its prompt is read a second time.
    """

    blocks: GrowableArray = field(default_factory=_no_blocks)
    store_id: int = -1
    num_shared: int = 0
    free_slots: int = 0
    state: EvictionState = field(default_factory=EvictionState)
    replay: ReplayState | None = None

    @property
    def is_staged(self) -> bool:
        """Whether its keys and values lie on staging blocks."""
        return len(self.blocks) > 0
