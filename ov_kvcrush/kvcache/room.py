"""Room in the store: cached prefixes are dropped for it, where that helps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ov_kvcrush import native
from ov_kvcrush.core.snapshot import KVSnapshot
from ov_kvcrush.kvcache.admission import Admission
from ov_kvcrush.kvcache.prefix_cache import PrefixCache

T = TypeVar("T")


@dataclass(frozen=True)
class PrefixLimit:
    """Bytes that cached prefixes may hold; `fewest` of the latest stay whatever they hold, while nobody needs them."""

    max_bytes: int
    fewest: int = 0


@dataclass(frozen=True, eq=False)
class Room:
    """The store's bytes, what of them is promised, and the prefixes that give way."""

    store: native.Store
    admission: Admission
    prefixes: PrefixCache[KVSnapshot]

    def make(self) -> bool:
        """Drop as few prefixes as leave room for all that is promised. False, and none is dropped, if all do not."""
        missing = self.store.nbytes + self.admission.promised() - self.store.max_bytes
        if missing <= 0:
            return True
        return self.prefixes.drop_until(lambda kept: self.freed_by(kept) >= missing)

    def make_for(self, attempt: Callable[[], bool], promised: int, needed: int = 1) -> bool:
        """Drop prefixes until `attempt` finds room beside what is promised. False if it does not.

        needed: bytes that it takes at least. Where not even these are there without all prefixes, none is dropped.
        """
        if attempt():
            return True
        least = self.store.nbytes - self.freed_by(self.prefixes.kept())
        if least + promised + needed > self.store.max_bytes:
            return False
        while self.prefixes.drop_oldest():
            if attempt():
                return True
        return False

    def call(self, function: Callable[[], T], promised: int, needed: int = 1) -> T:
        """What `function` returns when prefixes have made room for it, as by `make_for`. Raises its last StoreFull."""
        found: list[T] = []
        reasons: list[native.StoreFull] = []

        def attempt() -> bool:
            try:
                found.append(function())
            except native.StoreFull as error:
                reasons.append(error)
            return bool(found)

        if not self.make_for(attempt, promised, needed):
            raise reasons[-1]
        return found[0]

    def shrink(self, limit: int, fewest: int = 0) -> None:
        """Drop the least recently used prefixes until the others hold `limit` bytes at most, shared ones once.

        fewest: so many of the latest stay in any case.
        """
        if self.store.nbytes <= limit:  # known without a look at each tile
            return
        kept = self.prefixes.kept()
        held = len(kept)

        def is_enough(dropped: list[KVSnapshot]) -> bool:
            left = kept[len(dropped) : held]
            return len(left) <= fewest or self.store.nbytes_of_all([x.store_id for x in left]) <= limit

        self.prefixes.drop_until(is_enough)

    def freed_by(self, kept: list[KVSnapshot]) -> int:
        """Bytes that would be free without these."""
        return self.store.nbytes_freed_by([x.store_id for x in kept])
