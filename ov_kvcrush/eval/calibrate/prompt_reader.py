"""Calibration prompts that stay read: each is measured twice, and reading one takes as long as many of its caches."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from ov_kvcrush.core.eviction import NO_REPLAY_PROMPT, ReplayPrompt
from ov_kvcrush.errors import CrushError
from ov_kvcrush.eval.calibrate.meter import CacheMeter, ReadPrompt
from ov_kvcrush.policies.base import Policy


@dataclass(frozen=True, eq=False)
class Prompt:
    """name: of the text. ids: int64 (S,), rendered as a turn of a chat.

    suffix: int64 (T,), a question that comes after compression; None = the prompt ends with it. head: tokens at the
    front that always stay. replay_prompt: for policies that read the prompt twice.
    """

    name: str
    ids: np.ndarray
    suffix: np.ndarray | None = None
    head: int = 0
    replay_prompt: ReplayPrompt = NO_REPLAY_PROMPT


class PromptReader:
    """Reads prompts, and keeps them read while the staging blocks have room.

    policy: which tokens an evicted head keeps. answer_tokens: of the full cache's answer, at most. ends: token ids.
    """

    def __init__(self, meter: CacheMeter, policy: Policy, answer_tokens: int, ends: set[int]) -> None:
        self.meter = meter
        self.policy = policy
        self._answer_tokens = answer_tokens
        self._ends = ends
        self._stack = ExitStack()
        self._kept: dict[Prompt, ReadPrompt] = {}

    def read(self, prompt: Prompt) -> ReadPrompt:
        """The prompt on staging blocks, valid until the next call. Raises CrushError where it does not fit them."""
        if prompt in self._kept:
            return self._kept[prompt]
        try:
            found = self._read(prompt)
        except CrushError:
            if not self._kept:
                raise
            self.close()
            found = self._read(prompt)
        self._kept[prompt] = found
        return found

    def close(self) -> None:
        """Give the staging blocks of all prompts back."""
        self._kept.clear()
        self._stack.close()

    def _read(self, prompt: Prompt) -> ReadPrompt:
        return self._stack.enter_context(
            self.meter.read(
                prompt.ids, self._answer_tokens, self.policy, self._ends,
                suffix=prompt.suffix, head=prompt.head, replay_prompt=prompt.replay_prompt,
            )
        )  # fmt: skip
