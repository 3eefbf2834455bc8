"""Group beam search over the rows of logits of one request: which beams go on with which tokens, and which end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import openvino_genai as ov_genai

from ov_kvcrush.core.beam_params import BeamParams, StopCriteria
from ov_kvcrush.core.eviction import EvictionState
from ov_kvcrush.core.request import FinishReason, Request, Sequence
from ov_kvcrush.core.stop_strings import StopStringTracker
from ov_kvcrush.engine.penalties import apply_penalties
from ov_kvcrush.engine.top_tokens import log_probabilities, repeated_ngrams, top_tokens

Float = np.float32  # of all scores, as in openvino_genai: sums of them decide which beam goes on


@dataclass(frozen=True, eq=False)
class Beam:
    """A sequence that goes on, and the sum of the log probabilities of its answer."""

    sequence: Sequence
    score: Float


@dataclass(frozen=True, eq=False)
class Child:
    """A token that may follow a beam, and their score together. tracker: of the text with it, for stop strings."""

    parent: Sequence
    token: int
    logprob: Float
    score: Float
    tracker: StopStringTracker | None = None

    def follow(self, sequence: Sequence, now: float) -> None:
        """Append it to its parent, or to a fork of that."""
        sequence.ids.append(self.token)
        sequence.logprobs.append(float(self.logprob))
        sequence.token_times.append(now)
        sequence.cumulative_logprob = float(self.score)
        sequence.stop_tracker = self.tracker


class _Group:
    """Beams that compete with each other. ended: (score by length, answer), as many as beams at most."""

    def __init__(self, params: BeamParams, root: Sequence) -> None:
        self._params = params
        # More beams of the same text would only choose the same tokens.
        self.beams = [Beam(root, Float(0))]
        self.ended: list[tuple[Float, Sequence]] = []
        self.is_done = False

    def admits(self, score: Float) -> bool:
        """Whether an answer of this score is among the best."""
        return len(self.ended) < self._params.group_size or bool(score > self.ended[-1][0])

    def end(self, score: Float, sequence: Sequence) -> None:
        """Take in an answer that was admitted; the worst one goes where there are too many."""
        self.ended.append((score, sequence))
        self.ended.sort(key=lambda entry: -entry[0])
        del self.ended[self._params.group_size :]

    def judge(self, max_new_tokens: int) -> None:
        """Be done if no beam is to be better than the answers, by what the beams were before this step."""
        if len(self.ended) < self._params.group_size:
            return
        best, length = self.beams[0].score, self.beams[0].sequence.num_generated
        if self._params.stop_criteria == StopCriteria.NEVER and self._params.length_penalty > 0:
            length = max_new_tokens
        is_early = self._params.stop_criteria == StopCriteria.EARLY
        self.is_done = bool(is_early or self.ended[-1][0] >= by_length(best, length, self._params))


def by_length(score: Float, length: int, params: BeamParams) -> Float:
    """A score divided by a length to the power of the length penalty."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return Float(score / np.power(Float(max(length, 1)), Float(params.length_penalty)))


class BeamSearch:
    """The search of one request, from the logits of its prompt to its answers.

    It follows openvino_genai's GroupBeamSearcher, so both find the same answers from the same logits. A text with a
    stop string has the length that it had before, and among more ends than beams in one step the best go on: that one
    has what its sort leaves there.
    state_of: what policies left of a sequence.
    """

    def __init__(self, request: Request, state_of: Callable[[Sequence], EvictionState]) -> None:
        params = request.params.beam
        assert params is not None, "a beam search without its parameters"
        self._params = params
        self._request = request
        self._state_of = state_of
        self._groups = [_Group(params, request.root) for _ in range(params.num_beam_groups)]

    @property
    def beams(self) -> list[Sequence]:
        """Sequences that go on; all groups begin with the root."""
        return list(dict.fromkeys(beam.sequence for group in self._groups if not group.is_done for beam in group.beams))

    # -- one step ------------------------------------------------------------------------------------------------------

    def select(self, rows: Mapping[Sequence, np.ndarray], now: float) -> list[list[Child]]:
        """What follows the beams of each group that goes on, the best first; answers that end are noted.

        rows: logits of each of `beams`, float32 (vocabulary,); they stay as they are. Raises FloatingPointError for
        those without a finite maximum.
        """
        logprobs = {sequence: self._log_probabilities(sequence, row) for sequence, row in rows.items()}
        chosen: list[int] = []  # tokens of earlier groups in this step
        found: list[list[Child]] = []
        for group in self._groups:
            if group.is_done:
                continue
            children = self._select_of(group, logprobs, chosen, now)
            chosen += [child.token for child in children]
            if not children and not group.ended:  # each token that is possible was banned
                self._end_beams(group, FinishReason.LENGTH)
            group.judge(self._request.params.max_new_tokens)
            group.is_done |= not children
            if not group.is_done:
                found.append(children)
        return found

    def _log_probabilities(self, sequence: Sequence, row: np.ndarray) -> np.ndarray:
        """Of all tokens, float32 (vocabulary,); -inf for those that must not follow."""
        if self._request.params.changes_logits:
            row = apply_penalties(row, sequence)
        logprobs = log_probabilities(row)
        banned = repeated_ngrams(sequence.ids.view, self._params.no_repeat_ngram_size)
        logprobs[banned] = -np.inf
        return logprobs

    def _select_of(
        self, group: _Group, logprobs: Mapping[Sequence, np.ndarray], chosen: list[int], now: float
    ) -> list[Child]:
        size = self._params.group_size
        candidates = [
            Child(beam.sequence, token, logprob, beam.score + logprob)
            for beam in group.beams
            for token, logprob in self._best(logprobs[beam.sequence], chosen)
        ]
        candidates.sort(key=lambda child: -child.score)  # stable
        children: list[Child] = []
        for rank, child in enumerate(candidates):
            ends_by_token = child.token in self._request.params.stop_token_ids
            tracker = self._tracked(child)
            if ends_by_token or (tracker and tracker.match):
                if rank < size:
                    self._end(group, child, tracker, now, counts_last=ends_by_token)
                continue
            children.append(Child(child.parent, child.token, child.logprob, child.score, tracker))
            if len(children) == size:
                break
        return children

    def _best(self, logprobs: np.ndarray, chosen: list[int]) -> list[tuple[int, Float]]:
        """Twice as many tokens as a group has beams: with one end token, enough of them go on."""
        if not chosen:
            return top_tokens(logprobs, 2 * self._params.group_size)
        tokens, times = np.unique(chosen, return_counts=True)
        before = logprobs[tokens]
        logprobs[tokens] -= Float(self._params.diversity_penalty) * times.astype(Float)
        best = top_tokens(logprobs, 2 * self._params.group_size)
        logprobs[tokens] = before
        return best

    def _tracked(self, child: Child) -> StopStringTracker | None:
        tracker = child.parent.stop_tracker
        if tracker is None:
            return None
        tracker = tracker.copy()
        tracker.add(child.token)
        return tracker

    def _end(
        self, group: _Group, child: Child, tracker: StopStringTracker | None, now: float, *, counts_last: bool
    ) -> None:
        """Note an answer, if it is among the best of its group."""
        score = by_length(child.score, child.parent.num_generated + counts_last, self._params)
        if not group.admits(score):
            return
        sequence = child.parent.fork(0)
        Child(child.parent, child.token, child.logprob, child.score, tracker).follow(sequence, now)
        sequence.final_state = self._state_of(child.parent)
        sequence.finish_reason = FinishReason.STOP
        group.end(score, sequence)

    def grow(self, sequences: list[list[Sequence]], children: list[list[Child]]) -> None:
        """Go on with what `select` returned. sequences: the child of each."""
        going_on = [group for group in self._groups if not group.is_done]
        for group, own, chosen in zip(going_on, sequences, children, strict=True):
            group.beams = [Beam(s, child.score) for s, child in zip(own, chosen, strict=True)]

    # -- the end -------------------------------------------------------------------------------------------------------

    def end(self, reason: ov_genai.GenerationFinishReason) -> None:
        """End all beams that go on."""
        for group in self._groups:
            if not group.is_done:
                self._end_beams(group, reason)
                group.is_done = True

    def _end_beams(self, group: _Group, reason: ov_genai.GenerationFinishReason) -> None:
        for beam in group.beams:
            sequence = beam.sequence
            score = by_length(beam.score, sequence.num_generated, self._params)
            if not group.ended or group.admits(score):
                sequence.finish_reason = reason
                sequence.final_state = self._state_of(sequence)
                group.end(score, sequence)

    def answers(self) -> list[Sequence]:
        """As many as are asked for, the best first, with their final scores; of ended groups."""
        ended = [sequence for group in self._groups for _, sequence in group.ended]
        for sequence in ended:
            total = Float(sequence.cumulative_logprob)
            sequence.cumulative_logprob = float(by_length(total, sequence.num_generated, self._params))
        ended.sort(key=lambda sequence: -sequence.cumulative_logprob)
        del ended[self._request.params.num_return_sequences :]
        for index, sequence in enumerate(ended):
            sequence.index = index
        return ended
