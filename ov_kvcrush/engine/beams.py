"""Beam searches of all requests: they wait for the logits of all their beams, then fork and drop sequences."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.request import Request, Sequence
from ov_kvcrush.engine.beam_search import BeamSearch, Child
from ov_kvcrush.engine.scheduler import Scheduler
from ov_kvcrush.kvcache.manager import KVCacheManager


class Beams:
    """Searches that have begun, and how their beams share memory.

    The first logits of a request come from its root, which reads the prompt; its beams are forks of it. Where their
    memory was taken the root reads the prompt again, and the beams, which have kept their tokens, go on from there.
    """

    def __init__(self, scheduler: Scheduler, cache: KVCacheManager) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._searches: dict[Request, BeamSearch] = {}

    def __contains__(self, request: Request) -> bool:
        return request in self._searches

    def take(self, due: Iterable[tuple[Sequence, np.ndarray]], now: float) -> list[tuple[Sequence, Exception | None]]:
        """Move searches on with the logits of a step, float32 (vocabulary,) of each sequence.

        Returns a sequence of each request whose search has come to its end, or broke.
        """
        rows: dict[Request, dict[Sequence, np.ndarray]] = {}
        for sequence, row in due:
            rows.setdefault(sequence.request, {})[sequence] = row
        over: list[tuple[Sequence, Exception | None]] = []
        for request, own in rows.items():
            try:
                if self._move(request, own, now):
                    over.append((request.root, None))
            except Exception as error:
                over.append((request.root, error))
        return over

    def _move(self, request: Request, rows: dict[Sequence, np.ndarray], now: float) -> bool:
        """Whether the search is at its end."""
        search = self._searches.get(request)
        if search is None:
            search = self._searches[request] = BeamSearch(request, self._cache.eviction_state)
        elif request.root in rows:
            self._resume(request, search)
            return False
        for sequence in search.beams:
            if sequence.held_logits is not None:
                rows[sequence] = sequence.held_logits
        if len(rows) < len(search.beams):
            for sequence, row in rows.items():  # the others' come with later steps, which overwrite these
                if sequence.held_logits is None:
                    sequence.held_logits = row.copy()
            return False
        before = request.sequences
        children = search.select(rows, now)
        request.root.token_times.append(now)
        for sequence in rows:
            sequence.held_logits = None
        self._grow(request, search, children, now)
        is_over = not search.beams or search.beams[0].num_generated == request.params.max_new_tokens
        if is_over:
            request.peak_kv_bytes = max(request.peak_kv_bytes, sum(self._cache.bytes_of(s) for s in before))
        self._scheduler.remove(s for s in before if s not in request.sequences and s is not request.root)
        return is_over

    def _grow(self, request: Request, search: BeamSearch, children: list[list[Child]], now: float) -> None:
        """Fork each beam for all of its children but the last, which it goes on as itself."""
        to_come: dict[Sequence, int] = {}
        for child in (child for own in children for child in own):
            to_come[child.parent] = to_come.get(child.parent, 0) + 1
        is_first = request.root in request.sequences
        request.sequences = []
        grown: list[list[Sequence]] = []
        for own in children:
            grown.append([])
            for child in own:
                to_come[child.parent] -= 1
                goes_on = not to_come[child.parent] and not is_first
                sequence = child.parent if goes_on else self._scheduler.fork(child.parent, len(request.sequences))
                sequence.index = len(request.sequences)
                request.sequences.append(sequence)
                grown[-1].append(sequence)
                child.follow(sequence, now)
        search.grow(grown, children)
        if is_first:
            self._leave_root(request)

    def _resume(self, request: Request, search: BeamSearch) -> None:
        request.sequences = search.beams
        for sequence in request.sequences:
            self._scheduler.join(request.root, sequence)
        self._leave_root(request)

    def _leave_root(self, request: Request) -> None:
        """The root runs no more; the KV of the prompt stays for later prompts if the request wants that."""
        if request.keep_kv or request.returns_snapshot:
            self._scheduler.park(request.root)
        else:
            self._scheduler.remove([request.root])

    def end(self, request: Request, reason: ov_genai.GenerationFinishReason) -> list[Sequence]:
        """The answers of a search, with beams that still go on among them; nothing of it holds memory then."""
        search = self._searches.pop(request)
        running = [s for s in self._scheduler.running if s.request is request]
        search.end(reason)
        self._scheduler.remove([request.root, *running])
        for sequence in (request.root, *running):
            if not sequence.is_finished:  # it is none of the answers
                sequence.finish_reason = reason
        request.sequences = search.answers()
        return request.sequences

    def forget(self, request: Request) -> None:
        """Drop the search of a request that ends without an answer."""
        self._searches.pop(request, None)
