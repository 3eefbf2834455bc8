"""What a policy cannot do is refused at once, by name and with both numbers, and touches no other request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from eviction_runs import EXACT, F32, add, as_lists, held, make_engine, prompt, read_prompt, run, small, tokens

from ov_kvcrush import ContinuousBatchingPipeline, CrushError, LLMPipeline
from ov_kvcrush.policies.kvcrush.policy import KVCrush


@dataclass(frozen=True)
class Bad:
    """Options of a request with a prompt of 100 tokens, "abcd..." again and again, and what is said to them."""

    id: str
    options: dict[str, Any]
    message: str


SPANS = r"protect must be spans \(begin, end\) with 0 <= begin < end <= 100, the prompt's tokens, got "
BAD = [
    Bad("kept 0", {"policy": {"name": "kvcrush", "kept": 0}}, r"kept must be a fraction in \(0, 1\], got 0"),
    Bad("kept above 1", {"policy": {"name": "h2o", "kept": 1.5}}, r"kept must be a fraction in \(0, 1\], got 1.5"),
    Bad("kept negative", {"policy": {"name": "h2o", "kept": -0.25}}, r"kept must be a fraction in \(0, 1\], got -0.25"),
    Bad("kept is no number", {"policy": {"name": "h2o", "kept": "half"}}, "kept must be a fraction .* got 'half'"),
    Bad(
        "both budgets",
        {"policy": {"name": "h2o", "kept": 0.5, "kept_tokens": 64}},
        "only one of kept and kept_tokens can be given, got 0.5 and 64",
    ),
    Bad(
        "below what stays",
        {"policy": {"name": "kvcrush", "kept_tokens": 20}},
        r"kept_tokens must be at least the protected tokens, sink_tokens \+ recent_tokens = 36, got 20",
    ),
    Bad(
        "below what stays with spans",
        {"policy": {"name": "kvcrush", "kept_tokens": 40, "min_tokens": 40}, "protect": [(0, 30)]},
        "kept tokens must be at least the protected ones, 62 with sinks, recent tokens and spans, got a budget of 40",
    ),
    Bad("span beyond the end", {"policy": "kvcrush", "protect": [(90, 101)]}, SPANS + r"\(90, 101\)"),
    Bad("span before the start", {"policy": "kvcrush", "protect": [(-4, 4)]}, SPANS + r"\(-4, 4\)"),
    Bad("empty span", {"policy": "kvcrush", "protect": [(5, 5)]}, SPANS + r"\(5, 5\)"),
    Bad("span without a policy", {"protect": [(90, 101)]}, SPANS + r"\(90, 101\)"),
    Bad("span of three", {"protect": [(1, 2, 3)]}, r"passages and spans \(begin, end\), got \(1, 2, 3\) in it"),
    Bad("span of fractions", {"protect": [(1.5, 2)]}, r"passages and spans \(begin, end\), got \(1.5, 2\) in it"),
    Bad("one text", {"protect": "abcd"}, r"protect must be a list of passages and spans \(begin, end\), got 'abcd'"),
    Bad("nothing", {"protect": None}, "protect must be a list of passages and spans"),
    Bad("passage that is not there", {"protect": ["xyz"]}, "passages of the prompt, got 'xyz', which is not in it"),
    Bad("empty passage", {"protect": [""]}, "passages of the prompt, got '', which is not in it"),
    Bad(
        "unknown policy", {"policy": "kvcrash"}, r"policy must be one of .*, got 'kvcrash' \(did you mean 'kvcrush'\?\)"
    ),
    Bad(
        "unknown setting",
        {"policy": {"name": "kvcrush", "kept_token": 64}},
        r"setting of policy 'kvcrush' must be one of .*, got 'kept_token' \(did you mean 'kept_tokens'\?\)",
    ),
    Bad(
        "unknown choice",
        {"policy": {"name": "kvcrush", "split": "adda"}},
        r"split must be one of .*, got 'adda' \(did you mean 'ada'\?\)",
    ),
    Bad("number for a policy", {"policy": 5}, "policy must be a Policy, a name, or settings with a 'name', got 5"),
    Bad("settings without a name", {"policy": {"kept": 0.5}}, "settings with a 'name', got {'kept': 0.5}"),
    Bad("class for a policy", {"policy": KVCrush}, "policy must be a Policy, a name, or settings with a 'name'"),
    Bad("chunk of none", {"policy": {"name": "kvzip", "chunk": 0}}, "chunk must be an integer of at least 32, got 0"),
    Bad("sight of none", {"policy": {"name": "kvzip", "sees": "al"}}, "sees must be one of chunk, all, got 'al'"),
]
LETTERS = np.array([ord("a") - 33 + i % 20 for i in range(100)])  # of the tiny byte-level tokenizer


@pytest.fixture(scope="module")
def pipe(tiny_ir: Callable[[str], Path]) -> ContinuousBatchingPipeline:
    return ContinuousBatchingPipeline(tiny_ir("llama"), properties=F32, cache_config=EXACT)


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.id)
def test_bad_request_is_refused_and_touches_no_other(bad: Bad, pipe: ContinuousBatchingPipeline) -> None:
    ids, options = ov.Tensor(prompt(60)[None]), {"max_new_tokens": 12, "ignore_eos": True}
    policy = small({"name": "h2o"})
    expected = pipe.generate([ids], policy=policy, **options)[0].m_generation_ids
    other = pipe.add_request(0, ids, policy=policy, **options)
    for _ in range(5):
        pipe.step()
    with pytest.raises(CrushError, match=bad.message):
        pipe.add_request(1, ov.Tensor(LETTERS[None].copy()), **options, **bad.options)
    while pipe.has_non_finished_requests():
        pipe.step()
    assert [output.generated_ids for output in other.outputs()] == expected
    assert pipe.get_metrics().num_used_blocks == pipe.get_metrics().requests == 0


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"name": "kvcrush", "kept": 2}, r"kept must be a fraction in \(0, 1\], got 2"),
        ("kvcrash", "did you mean 'kvcrush'"),
        (7, "policy must be a Policy, a name, or settings with a 'name', got 7"),
    ],
)
def test_bad_policy_of_a_pipeline_is_refused_before_a_model_is_read(policy: Any, message: str) -> None:
    with pytest.raises(CrushError, match=message):
        LLMPipeline(cache_config={"policy": policy})


def test_paged_attention_takes_no_policy(tiny_ir: Callable[[str], Path]) -> None:
    message = "policy must be 'none' with attention='paged', got 'kvcrush'"
    with pytest.raises(CrushError, match=message):
        LLMPipeline(tiny_ir("llama"), cache_config={"attention": "paged", "policy": "kvcrush"})
    pipe = LLMPipeline(tiny_ir("llama"), cache_config={"attention": "paged"})
    ids = ov.Tensor(prompt(40)[None])
    with pytest.raises(CrushError, match=message):
        pipe.generate(ids, max_new_tokens=2, policy="kvcrush")
    whole = pipe.generate(ids, max_new_tokens=2, ignore_eos=True).tokens
    assert pipe.generate(ids, max_new_tokens=2, ignore_eos=True, policy="none").tokens == whole


@pytest.mark.parametrize("window", [101, 1000, 100_000])
def test_window_longer_than_the_text_is_the_text(window: int, tiny_ir: Callable[[str], Path]) -> None:
    engine = make_engine(tiny_ir("llama"))
    for name in ("snapkv", "h2o", "expected_attention", "rkv"):
        wide, whole = (small({"name": name, "window": w}) for w in (window, 100))
        held_by = []
        for policy in (wide, whole):
            line = read_prompt(engine, add(engine, 0, prompt(100), policy, new_tokens=3))
            held_by.append(as_lists(held(engine, line)))
            run(engine)
        assert held_by[0] == held_by[1]


def test_prompt_that_is_too_short_to_be_evicted_from_must_fit_whole(tiny_ir: Callable[[str], Path]) -> None:
    folder = tiny_ir("llama")
    probe: Any = make_engine(folder).cache
    captured = probe.store.capture_bytes(small({"name": "snapkv"}).inputs.window)
    room = probe.store.bytes_for(96) + captured
    engine = make_engine(folder, {**EXACT, "max_bytes": room}, max_num_batched_tokens=16)
    with pytest.raises(CrushError, match=r"must fit into the KV store of .* got 150 tokens"):
        add(engine, 0, prompt(150), small({"name": "snapkv"}, kept_tokens=16, min_tokens=200))
    handle = add(engine, 0, prompt(150), small({"name": "snapkv"}, kept_tokens=16))
    run(engine)
    assert len(tokens(handle)[0]) == 12
