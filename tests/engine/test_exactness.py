"""Without compression the engine is exact: openvino_genai's greedy tokens, in any batch, after any preemption."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import openvino as ov
import openvino_genai as ov_genai
import pytest
from covering import rarely

from ov_kvcrush import ContinuousBatchingPipeline, GenerationConfig, GenerationStatus, SchedulerConfig

pytestmark = pytest.mark.numerics

# Without the last one the plugin quantises the activations of compressed layers to int8 in groups of 32: a difference
# of 1e-5 between two orders of summation then becomes 0.5 in a logit wherever a value crosses a rounding border.
F32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
LENGTHS = (5, 33, 64, 200, 513, 1000)
CHUNK = 512
NEW_TOKENS = 40  # the blocks of some answers end within them


def text_ids(folder: Path, count: int) -> np.ndarray:
    """Tokens of real text: the documentation strings of Python's standard library."""
    import argparse
    import difflib
    import logging.config
    import optparse

    sources = [Path(m.__file__).read_text() for m in (argparse, difflib, optparse, logging.config)]
    tokenizer = ov_genai.Tokenizer(str(folder))
    ids = tokenizer.encode("\n".join(sources)).input_ids.data[0].astype(np.int64)
    assert len(ids) >= count
    return ids[:count]


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[np.ndarray]:
    ids = text_ids(smollm2, max(LENGTHS) + 100 * len(LENGTHS))
    return [ids[100 * i : 100 * i + n] for i, n in enumerate(LENGTHS)]


def run_together(pipe: ContinuousBatchingPipeline, prompts: list[np.ndarray], new_tokens: int) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=new_tokens, ignore_eos=True)
    handles = [pipe.add_request(i, ov.Tensor(ids[None].copy()), config) for i, ids in enumerate(prompts)]
    while pipe.has_non_finished_requests():
        pipe.step()
    assert all(h.get_status() == GenerationStatus.FINISHED for h in handles)
    return [h.outputs()[0].generated_ids for h in handles]


@pytest.mark.parametrize(
    ("model", "lengths"), [("shallow", LENGTHS), ("smollm2", LENGTHS[1:2]), *rarely(("smollm2", LENGTHS))]
)
def test_greedy_tokens_equal_openvino_genai(
    model: str, lengths: tuple[int, ...], prompts: list[np.ndarray], request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(model)
    prompts = [ids for ids in prompts if len(ids) in lengths]
    ours = ContinuousBatchingPipeline(folder, SchedulerConfig(max_num_batched_tokens=CHUNK), properties=F32)
    answers = [run_together(ours, [p], NEW_TOKENS)[0] for p in prompts]
    del ours
    scheduler = ov_genai.SchedulerConfig()
    scheduler.max_num_batched_tokens = CHUNK
    stock = ov_genai.ContinuousBatchingPipeline(str(folder), scheduler, "CPU", F32)
    config = GenerationConfig(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for ids, answer in zip(prompts, answers, strict=True):
        handle = stock.add_request(0, ov.Tensor(ids[None].copy()), config)
        while stock.has_non_finished_requests():
            stock.step()
        assert len(answer) == NEW_TOKENS
        assert answer == handle.read_all()[0].generated_ids, f"prompt of {len(ids)} tokens"


def batch_of_16(shallow: Path) -> list[np.ndarray]:
    ids = text_ids(shallow, 3000)
    lengths = np.random.default_rng(7).integers(1, 170, 16)
    return [ids[150 * i : 150 * i + n] for i, n in enumerate(lengths)]


@pytest.mark.parametrize("new_tokens", [16, *rarely(40)])
def test_batch_equals_single(new_tokens: int, shallow: Path) -> None:
    pipe = ContinuousBatchingPipeline(shallow, SchedulerConfig(max_num_batched_tokens=128), properties=F32)
    prompts = batch_of_16(shallow)
    alone = [run_together(pipe, [p], new_tokens)[0] for p in prompts]
    assert run_together(pipe, prompts, new_tokens) == alone
    assert pipe.get_metrics().num_preemptions == 0
    assert pipe.get_metrics().num_used_blocks == 0

    # A quarter of the blocks that all 16 need together: sequences lose their KV and compute it again, whoever is first.
    # max_step_ms=0: on a slow machine shorter chunks let the first answers end before the last prompts begin.
    config = SchedulerConfig(max_num_batched_tokens=128, num_kv_blocks=12, max_step_ms=0)
    small = ContinuousBatchingPipeline(shallow, config, properties=F32)
    assert run_together(small, prompts, new_tokens) == alone
    assert small.get_metrics().num_preemptions > 0
    assert small.get_metrics().num_used_blocks == 0


def test_same_seed_same_output_in_any_company(shallow: Path) -> None:
    pipe = ContinuousBatchingPipeline(shallow, properties=F32)
    prompts = batch_of_16(shallow)[:4]
    config = GenerationConfig(max_new_tokens=24, do_sample=True, temperature=0.9, top_k=50, top_p=0.95, rng_seed=11)

    def drawn(together: list[np.ndarray]) -> list[list[int]]:
        handles = [pipe.add_request(i, ov.Tensor(ids[None].copy()), config) for i, ids in enumerate(together)]
        while pipe.has_non_finished_requests():
            pipe.step()
        return [h.outputs()[0].generated_ids for h in handles]

    alone = [drawn([p])[0] for p in prompts]
    assert drawn(prompts) == alone
    other = GenerationConfig(max_new_tokens=24, do_sample=True, temperature=0.9, top_k=50, top_p=0.95, rng_seed=12)
    handle = pipe.add_request(0, ov.Tensor(prompts[3][None].copy()), other)
    while pipe.has_non_finished_requests():
        pipe.step()
    assert handle.outputs()[0].generated_ids != alone[3]


def test_chunk_size_does_not_change_tokens(shallow: Path, prompts: list[np.ndarray]) -> None:
    answers = []
    for chunk in (37, 1000):
        pipe = ContinuousBatchingPipeline(shallow, SchedulerConfig(max_num_batched_tokens=chunk), properties=F32)
        answers.append(run_together(pipe, prompts[3:5], 16))
        del pipe
    assert answers[0] == answers[1]
