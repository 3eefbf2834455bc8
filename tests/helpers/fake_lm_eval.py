"""The few names of the package lm-eval that the adapter uses, as of lm-eval 0.4.13, for where it is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest


class _CacheHook:
    def add_partial(self, name: str, arguments: Any, result: Any) -> None:
        pass


class TemplateLM:
    """How lm-eval's own class makes token ids of texts."""

    def __init__(self) -> None:
        self.cache_hook = _CacheHook()

    @classmethod
    def create_from_arg_obj(cls, arguments: dict[str, Any], more: dict[str, Any] | None = None) -> Any:
        return cls(**arguments, **{name: value for name, value in (more or {}).items() if value is not None})

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        num_spaces = len(context) - len(context.rstrip())
        if num_spaces > 0:
            continuation, context = context[-num_spaces:] + continuation, context[:-num_spaces]
        whole, begin = self.tok_encode(context + continuation), self.tok_encode(context)  # type: ignore[attr-defined]
        return begin, whole[len(begin) :]

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        prefix = self.prefix_token_id  # type: ignore[attr-defined]
        items = []
        for context, continuation in (request.args for request in requests):
            if context == "":
                ids = self.tok_encode(continuation, add_special_tokens=False)  # type: ignore[attr-defined]
                pair = ([prefix], ids) if prefix != ids[0] else (ids[:1], ids[1:])
            else:
                pair = self._encode_pair(context, continuation)
            items.append(((context, continuation), *pair))
        return self._loglikelihood_tokens(items, disable_tqdm=disable_tqdm)  # type: ignore[attr-defined]


def get_rolling_token_windows(
    token_list: list[int], prefix_token: int, max_seq_len: int, context_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    if not token_list:
        return
    first = min(max_seq_len, len(token_list))
    yield [prefix_token, *token_list[: first - 1]], token_list[:first]
    predicted = first
    while predicted < len(token_list):
        count = min(len(token_list) - predicted, max_seq_len - context_len + 1)
        end = predicted + count
        yield token_list[end - max_seq_len - 1 : end - 1], token_list[end - count : end]
        predicted += count


def make_disjoint_window(pair: tuple[list[int], list[int]]) -> tuple[list[int], list[int]]:
    return pair[0][: len(pair[0]) - (len(pair[1]) - 1)], pair[1]


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import lm_eval` find the names above."""
    models: dict[str, type] = {}

    def register_model(*names: str) -> Any:
        return lambda cls: [models.__setitem__(name, cls) for name in names] and cls

    contents: dict[str, dict[str, Any]] = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {
            "MODEL_REGISTRY": models,
            "register_model": register_model,
            "get_model": models.__getitem__,
        },
        "lm_eval.models": {},
        "lm_eval.utils": {
            "get_rolling_token_windows": get_rolling_token_windows,
            "make_disjoint_window": make_disjoint_window,
        },
    }
    for name, members in contents.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
