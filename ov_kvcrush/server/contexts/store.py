"""Contexts by the keys that made them: in the store, in files, and between both."""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from ov_kvcrush.contexts.context import Context
from ov_kvcrush.errors import ContextFileError, CrushError, OutOfMemory
from ov_kvcrush.pipelines.continuous_batching import ContinuousBatchingPipeline
from ov_kvcrush.server.contexts.folder import ContextFolder
from ov_kvcrush.server.contexts.held import HeldContext, held
from ov_kvcrush.server.errors import ApiError
from ov_kvcrush.server.logs import tell
from ov_kvcrush.server.metrics import Metrics
from ov_kvcrush.server.settings import ServerSettings

T = TypeVar("T")
_READERS = 4  # threads that wait for contexts to be read, written and loaded


class ContextStore:
    """Used by the loop only; what takes long runs in threads of its own.

    With a folder every context is written when it is made, so that it can leave the store at any moment, and the
    process too. Several processes may share the folder: what one writes or deletes is so for the others.
    """

    def __init__(self, pipeline: ContinuousBatchingPipeline, settings: ServerSettings, metrics: Metrics) -> None:
        self._pipeline = pipeline
        self._metrics = metrics
        self._most = settings.max_contexts
        limit = settings.max_contexts_mb
        self._limit = limit << 20 if limit else pipeline.get_metrics().cache_size_in_bytes // 2
        folder = settings.contexts_dir
        self._folder = ContextFolder(Path(folder)) if folder is not None else None
        self._threads = ThreadPoolExecutor(_READERS, "ov_kvcrush contexts")
        self._held: dict[tuple[str, str], HeldContext] = {}
        for found in self._folder.scan() if self._folder else ():
            self._held[found.owner, found.id] = found

    # -- what there is -------------------------------------------------------------------------------------------------

    def get(self, owner: str, name: str) -> HeldContext:
        """One by its id. Raises 404, alike for what is not there and for what is another's."""
        found = self._current(owner, name)
        if found is None:
            raise ApiError(404, "context must be the id of one of yours, got one that is not", "context")
        found.used = time.time()
        return found

    def of(self, owner: str) -> list[HeldContext]:
        """All of one owner, the newest first."""
        names = {name for of, name in self._held if of == owner}
        names.update(self._folder.names(owner) if self._folder else ())
        mine = [x for name in names if (x := self._current(owner, name)) is not None]
        return sorted(mine, key=lambda x: x.created, reverse=True)

    def _current(self, owner: str, name: str) -> HeldContext | None:
        """One by its id, as it is now if other processes share the folder."""
        found = self._held.get((owner, name))
        if self._folder is None:
            return found
        if found is None:
            found = self._folder.find(owner, name)
            if found is not None:
                self._held[owner, name] = found
        elif found.path is not None and not found.path.is_file():
            del self._held[owner, name]
            if not found.lock.locked():  # who loads it looks for it again
                self._close(found)
            return None
        return found

    def figures(self) -> tuple[int, int, int]:
        """How many there are, how many in the store, and their bytes there."""
        return len(self._held), len(list(self._resident())), self._bytes()

    # -- making --------------------------------------------------------------------------------------------------------

    async def make(
        self, owner: str, make: Callable[[Callable[[int, int], None]], Context], name: str | None = None
    ) -> HeldContext:
        """Hold what `make` makes in a thread, which is told to give up by what it reports its progress to.

        Raises 400 where its owner has too many, 507 where there is no room.
        """
        if len(self.of(owner)) >= self._most:
            raise ApiError(400, f"contexts must be at most {self._most} of one key, got one more; delete some")
        is_left = threading.Event()

        def progress(done: int, total: int) -> None:
            if is_left.is_set():
                raise CrushError("context must be waited for, got a client that went away")

        try:
            context = await self._with_room(lambda: make(progress))
        except asyncio.CancelledError:
            is_left.set()
            raise
        try:
            return await self._keep(owner, context, name)
        except BaseException:
            context.close()
            raise

    async def _keep(self, owner: str, context: Context, name: str | None) -> HeldContext:
        made = await self._run(held, f"ctx_{secrets.token_hex(16)}", owner, context, name)
        if self._folder is not None:
            made.path = await self._run(self._written, self._folder, made, context)
        self._shrink(beside=made.parts)
        if self._bytes(made.parts) > self._limit and made.path is None:
            raise ApiError(
                507, f"contexts must hold at most {self._limit} bytes, got {made.nbytes} more; delete some, or start "
                "the server with --contexts"
            )  # fmt: skip
        self._held[owner, made.id] = made
        return made

    def _written(self, folder: ContextFolder, made: HeldContext, context: Context) -> Path | None:
        """Its file; None where it cannot be written: it stays in the store then."""
        try:
            return folder.write(made, context)
        except ContextFileError as error:
            tell("context not written", logging.ERROR, context=made.id, reason=type(error.__cause__ or error).__name__)
            return None

    # -- using ---------------------------------------------------------------------------------------------------------

    async def lease(self, owner: str, name: str) -> Context:
        """A fork of a context, loaded if it must be; its taker closes it. Raises 404, and 409 for a file of old."""
        found = self.get(owner, name)
        self._metrics.context_lookups.inc()
        async with found.lock:
            if found.context is not None:
                self._metrics.context_hits.inc()
                return found.context.fork()
            path = found.path
            assert path is not None, "a context that is neither in the store nor in a file"
            self._shrink(found.nbytes)
            try:
                context = await self._with_room(lambda: Context.load(path, self._pipeline))
            except ContextFileError as error:
                tell("context not loaded", logging.ERROR, error, context=name)
                raise ApiError(409, "context must have been made with this model and these settings, got another's",
                               "context") from None  # fmt: skip
            self._metrics.context_loads.inc()
            found.parts = await self._run(lambda: context.nbytes_by_part)
            if (owner, name) not in self._held:  # deleted meanwhile
                context.close()
                raise ApiError(404, "context must be the id of one of yours, got one that is not", "context")
            found.context = context
            return context.fork()

    async def file(self, owner: str, name: str, spare: Path) -> Path:
        """Its file; one is written to `spare` if it has none."""
        found = self.get(owner, name)
        if found.path is not None and found.path.is_file():
            return found.path
        context = await self.lease(owner, name)
        try:
            await self._run(context.save, spare)
        except ContextFileError as error:
            raise ApiError(507, f"the context cannot be written: {type(error).__name__}") from None
        finally:
            context.close()
        return spare

    async def delete(self, owner: str, name: str) -> None:
        """Forget one; requests that go on from it end as they would. Raises 404."""
        found = self.get(owner, name)
        del self._held[owner, name]
        async with found.lock:
            self._close(found)
            if self._folder is not None:
                await self._run(self._folder.remove, found)

    async def call(self, function: Callable[..., T], *args: object) -> T:
        """Run what reads a context beside the loop."""
        return await self._run(function, *args)

    # -- room ----------------------------------------------------------------------------------------------------------

    async def _with_room(self, make: Callable[[], Context]) -> Context:
        """What `make` makes; without memory for it once more when all others that have files left the store."""
        try:
            return await self._run(make)
        except OutOfMemory:
            if not self._shrink(self._limit):
                raise ApiError(507, "contexts must fit into the KV store beside each other, got one that does not; "
                               "delete some, or start the server with more --max-kv-mb") from None  # fmt: skip
        try:
            return await self._run(make)
        except OutOfMemory as error:
            raise ApiError(507, str(error)) from None

    def _shrink(self, room: int = 0, beside: Mapping[int, int] | None = None) -> int:
        """Have the least recently used leave the store until it has `room` bytes, and these parts, beside the others;
        returns how many left.

        One that shares its bytes leaves no sooner than the others that have them: it would free nothing, and come back
        from its file with bytes of its own.
        """
        resident, beside = list(self._resident()), beside or {}
        holders = Counter(key for parts in (beside, *(x.parts for x in resident)) for key in parts)
        used: dict[int, float] = {}
        for found in resident:
            used.update((key, max(found.used, used.get(key, 0.0))) for key in found.parts)
        resident.sort(key=lambda x: (used[x.part], -x.part))  # what extends another before that other
        total, num_left = self._bytes(beside), 0
        for found in resident:
            if total + room <= self._limit:
                break
            if found.path is None or found.lock.locked():
                continue
            holders.subtract(found.parts.keys())
            total -= sum(nbytes for key, nbytes in found.parts.items() if not holders[key])
            num_left += 1
            self._close(found)
            self._metrics.context_evictions.inc()
        return num_left

    def _bytes(self, beside: Mapping[int, int] | None = None) -> int:
        """Bytes of all that are in the store, and of these parts; what several share counts once."""
        parts = dict(beside or {})
        for found in self._resident():
            parts.update(found.parts)
        return sum(parts.values())

    def _resident(self) -> Iterator[HeldContext]:
        return (x for x in self._held.values() if x.context is not None)

    @staticmethod
    def _close(found: HeldContext) -> None:
        if found.context is not None:
            found.context.close()
            found.context, found.parts = None, {}

    async def _run(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def close(self) -> None:
        """Give the bytes back; files stay."""
        self._threads.shutdown(cancel_futures=True)
        for found in self._held.values():
            self._close(found)
