"""Who evicts without saying how much has a plan of the default budget; who says something has that; others nothing."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from eviction_runs import as_lists
from native_stores import require_native

from ov_kvcrush import Context, LLMPipeline
from ov_kvcrush.config import DEFAULT_BUDGET
from ov_kvcrush.core.cache_params import CacheParams
from ov_kvcrush.core.outputs import RequestStats
from ov_kvcrush.policies.base import Budget
from ov_kvcrush.policies.registry import as_policy, build

Folder = Callable[[str], Path]
TEXT = "once upon a time there were nine boats " * 60
U4 = {"key_precision": "u4", "value_precision": "u4"}
LENGTH = 1500
REQUESTS = itertools.count()


@pytest.fixture(scope="module")
def folder(tiny_ir: Folder) -> Path:
    require_native()
    return tiny_ir("llama")


@pytest.fixture(scope="module")
def pipe(folder: Path) -> LLMPipeline:
    return LLMPipeline(folder, "CPU")


def ids(length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(3, 100, length)


def stats(pipe: LLMPipeline, prompt: np.ndarray, policy: Any = None, new_tokens: int = 2) -> RequestStats:
    options = pipe._options(None, {"max_new_tokens": new_tokens, "ignore_eos": True})
    handle = pipe._backend.add(next(REQUESTS), prompt, options, CacheParams(as_policy(policy)))
    handle.drive()
    handle.wait()
    handle.raise_error()
    return handle.get_stats()


def what(context: Context) -> tuple[int, Any]:
    """Bytes and kept places."""
    return context.nbytes, as_lists(context.kept_map().positions)


# -- contexts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", [None, "kvzip", "snapkv", {"name": "kvcrush", "window": 16}], ids=str)
def test_a_context_is_what_the_default_budget_makes_of_it(policy: Any, pipe: LLMPipeline) -> None:
    asked = pipe.with_cache({"budget": DEFAULT_BUDGET})
    with pipe.compress(TEXT, policy=policy) as found, asked.compress(TEXT, policy=policy) as expected:
        assert found.num_tokens > 1024
        assert what(found) == what(expected)
        assert found.policy is not None
        assert not {"kept", "kept_tokens"} & set(found.policy)


@pytest.mark.parametrize(
    ("named", "built"),
    [
        ({"kept": 0.25}, build("kvzip", kept=0.25)),
        ({"policy": "snapkv", "kept": 0.5}, build("snapkv", kept=0.5)),
        ({"policy": {"name": "snapkv", "kept_tokens": 300}}, build("snapkv", kept_tokens=300)),
        ({"policy": build("snapkv")}, build("snapkv", kept=0.25)),
        ({"policy": "adakv"}, build("adakv", kept=0.25)),
    ],
    ids=["fraction", "fraction of a name", "tokens", "policy", "shares"],
)
def test_a_context_keeps_what_is_named(named: dict[str, Any], built: Any, pipe: LLMPipeline) -> None:
    with pipe.compress(TEXT, **named) as found, pipe.compress(f" {TEXT}", policy=built) as other:
        tokens = built.budget.tokens(found.num_tokens)
        assert found.kept_tokens == tokens
        assert (other.kept_tokens, found.policy) == (built.budget.tokens(other.num_tokens), other.policy)


def test_a_context_of_the_default_budget_is_another_than_one_of_the_same_numbers(pipe: LLMPipeline) -> None:
    with pipe.compress(TEXT) as planned, pipe.compress(TEXT, kept=0.25) as named, pipe.compress(TEXT) as again:
        assert what(planned) == what(again)
        assert what(planned) != what(named)


def test_a_pipeline_s_precisions_hold_for_its_contexts(pipe: LLMPipeline) -> None:
    own = pipe.with_cache(U4)
    with own.compress(TEXT) as found, own.compress(f" {TEXT}", kept=0.25):
        assert found.kept_tokens == Budget(kept=0.25).tokens(found.num_tokens)


def test_a_saved_context_goes_on_as_it_would_have(pipe: LLMPipeline, tmp_path: Path) -> None:
    with pipe.compress(TEXT, policy="snapkv") as made:
        made.save(tmp_path / "c.kvc")
        with Context.load(tmp_path / "c.kvc", pipe) as loaded:
            assert loaded.chosen_by == made.chosen_by
            assert what(loaded) == what(made)
            more = "and they all came home " * 40
            with loaded.extend(more) as one, made.extend(more) as other:
                assert what(one) == what(other)


@pytest.mark.parametrize("budget", ["1/3", "1/6", "1/16"])
def test_a_context_of_several_is_what_it_is_alone_also_where_its_plan_keeps_all(budget: str, pipe: LLMPipeline) -> None:
    own = pipe.with_cache({"budget": budget})
    alone = own._loop.prefill(ids(), CacheParams(build("snapkv"), prefill_only=True), None).snapshot
    assert alone is not None
    both = pipe.compress_ids(ids(), [build("snapkv"), build("snapkv")], pipelines=[own, pipe])
    assert both[0].nbytes == alone.nbytes
    assert both[1].kept_tokens == LENGTH // 4
    alone.release()
    for context in both:
        context.close()


# -- requests ----------------------------------------------------------------------------------------------------------


def test_a_pipeline_without_policy_budget_and_eviction_keeps_everything_as_it_was(pipe: LLMPipeline) -> None:
    found = stats(pipe, ids())
    assert found.plan is None
    assert found.kept_tokens in (LENGTH, LENGTH + 1)
    handle = pipe._loop.prefill(ids(), CacheParams(prefill_only=True), None)
    assert handle.snapshot is not None
    assert handle.snapshot.nbytes == pipe._backend.cache.store.bytes_for(LENGTH)  # type: ignore[attr-defined]
    handle.snapshot.release()


def test_a_policy_without_a_number_is_planned_for_a_request_and_for_a_pipeline(
    pipe: LLMPipeline, caplog: pytest.LogCaptureFixture
) -> None:
    expected = stats(pipe.with_cache({"budget": DEFAULT_BUDGET, "policy": "snapkv"}), ids()).plan
    assert expected is not None
    caplog.clear()
    with caplog.at_level(logging.WARNING):  # nobody asked for a budget: none is told that the ladder meets it
        assert stats(pipe, ids(), "snapkv").plan == expected
        assert stats(pipe.with_cache({"policy": "snapkv"}), ids()).plan == expected
    assert not caplog.records


@pytest.mark.parametrize("cache", [{}, {"policy": "kvcrush"}], ids=["no policy", "a policy"])
@pytest.mark.parametrize(
    "policy",
    ["none", build("snapkv"), {"name": "snapkv", "kept": 0.25}, {"name": "h2o", "kept_tokens": 200}, "pyramidkv"],
    ids=str,
)
def test_requests_that_say_how_much_stays_have_no_plan(policy: Any, cache: Any, pipe: LLMPipeline) -> None:
    assert stats(pipe.with_cache(cache), ids(), policy).plan is None


def test_named_precisions_are_kept(pipe: LLMPipeline) -> None:
    found = stats(pipe.with_cache({"policy": "snapkv", **U4}), ids())
    assert found.plan is None
    assert found.kept_tokens is not None
    assert found.kept_tokens < LENGTH // 2


def test_a_short_prompt_is_whole_in_u8_and_its_conversation_goes_on_planned(folder: Path) -> None:
    policy = {"name": "kvcrush", "min_tokens": 200}
    config = {"enable_prefix_caching": True}
    pipe = LLMPipeline(folder, "CPU", cache_config={"policy": policy}, scheduler_config=config)
    begun = ids(200)
    first = stats(pipe, begun)
    assert first.plan is None
    assert first.kept_tokens in (200, 201)
    second = stats(pipe, np.concatenate([begun, ids(150, seed=1)]))
    assert second.plan is not None
    assert second.num_reused_tokens == len(begun)
    # An answer that grew over min_tokens was evicted from by the policy's own numbers: the plan goes on from that.
    other = ids(200, seed=2)
    answer = pipe.generate(ov.Tensor(other[None]), max_new_tokens=400, ignore_eos=True).tokens[0]
    third = stats(pipe, np.concatenate([other, answer[:-1], ids(60, seed=3)]))
    assert third.plan is not None
    assert third.num_reused_tokens == len(other) + len(answer) - 1


def test_a_profile_of_another_model_is_refused_when_it_is_needed(pipe: LLMPipeline, tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text("{}")
    wrong = pipe.with_cache({"profile": tmp_path / "p.json"})
    assert stats(wrong, ids(300)).plan is None
    with pytest.raises(ValueError, match="profile must have format 1"):
        stats(wrong, ids(300), "snapkv")
