"""The adapter for lm-eval: likelihoods equal Hugging Face's, answers equal the pipeline's, policies and refusals.

The tests run on the package lm-eval where it is installed, else on a stand-in of the few names that are used of it.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_lm_eval
import numpy as np
import pytest

from ov_kvcrush import ContinuousBatchingPipeline, CrushError, RequestError
from ov_kvcrush.eval.likelihood.forcing import Score
from ov_kvcrush.eval.likelihood.lm_eval import LM_EVAL_MODEL_NAME, model_class, register
from ov_kvcrush.eval.likelihood.lm_eval_arguments import generation_options, sort_arguments
from ov_kvcrush.eval.likelihood.scoring import scores_of

EXACT = {
    "key_precision": "f32", "value_precision": "f32", "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
}  # fmt: skip
TEXT = "The cat sat on the mat. Then it went to the door, looked out, and came back to its place by the fire. "
PAIRS = [
    (TEXT, "It slept."),
    (TEXT, "It did not sleep at all."),
    ("A short one:", " yes"),
    ("", "Nothing stands before this."),
    (3 * TEXT + " ", "And so on"),
]
KVCRUSH = {"policy": "kvcrush", "kept": 0.25, "min_tokens": 64, "recent_tokens": 16}

Load = Callable[..., Any]


@pytest.fixture(autouse=True)
def lm_eval(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if importlib.util.find_spec("lm_eval") is None:
        fake_lm_eval.install(monkeypatch)
    model_class.cache_clear()
    register()
    yield
    model_class.cache_clear()


@pytest.fixture(scope="module")
def folder(tiny_ir: Callable[[str], Path]) -> Path:
    return tiny_ir("llama")


@pytest.fixture
def load(folder: Path) -> Load:
    """The model as lm-eval makes it of --model_args."""

    def make(**arguments: Any) -> Any:
        cls = import_module("lm_eval.api.registry").get_model(LM_EVAL_MODEL_NAME)
        return cls.create_from_arg_obj({"pretrained": str(folder), **EXACT, **arguments}, {"device": None})

    return make


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=args) for args in arguments]


@pytest.fixture(scope="module")
def reference(tiny_hf: Callable[[str], Path]) -> Callable[[list[int], int], tuple[float, bool]]:
    """Log-likelihood of all ids but the first n by Hugging Face, and whether each is the most likely one."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_hf("llama")).eval()

    def score(ids: list[int], num_context: int) -> tuple[float, bool]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, num_context - 1 : -1].double()
        wanted = torch.tensor(ids[num_context:])
        logprobs = torch.log_softmax(logits, -1)[torch.arange(len(wanted)), wanted]
        return float(logprobs.sum()), bool((logits.argmax(-1) == wanted).all())

    return score


@pytest.mark.parametrize("tail_tokens", [0, 1, 7])
def test_likelihood_of_the_full_cache_equals_hugging_face(load: Load, reference: Any, tail_tokens: int) -> None:
    model = load(policy=None, tail_tokens=tail_tokens)
    found = model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    for (context, continuation), (logprob, is_greedy) in zip(PAIRS, found, strict=True):
        num_context = len(model.tok_encode(context.rstrip())) or 1
        ids = model.tok_encode(context + continuation)
        expected = reference(ids if context else [model.prefix_token_id, *ids], num_context)
        assert logprob == pytest.approx(expected[0], abs=1e-3)
        assert is_greedy == expected[1]


def test_the_greedy_answer_is_greedy_and_another_is_not(load: Load) -> None:
    model = load()
    ids = model.tok_encode(TEXT)
    pipe = ContinuousBatchingPipeline(model._pipeline.folder, **_pipeline_options())
    [answer] = pipe.generate(_tensor(ids), max_new_tokens=12)[0].m_generation_ids
    other = [*answer[:6], (answer[6] + 1) % 256, *answer[7:]]
    scores = scores_of(model._pipeline.forced_engine("this test"), [(ids, answer), (ids, other)], 1, 8)
    assert [score.is_greedy for score in scores] == [True, False]
    assert scores[0].logprob > scores[1].logprob


def test_rolling_likelihood_counts_every_token_once(load: Load, reference: Any) -> None:
    text = 3 * TEXT
    whole, cut = load(), load(max_length=100)
    ids = whole.tok_encode(text)
    expected, _ = reference([whole.prefix_token_id, *ids], 1)
    assert whole.loglikelihood_rolling(requests((text,)), disable_tqdm=True) == [pytest.approx(expected, abs=1e-3)]
    windows = [([cut.prefix_token_id], ids[:100]), (ids[99:100], ids[100:200]), (ids[199:200], ids[200:300])]
    rest = len(ids) - 300
    windows.append((ids[300 - 1 - (100 - rest) : 300], ids[300:]))
    by_hand = sum(reference(begin + end, len(begin))[0] for begin, end in windows)
    found = cut.loglikelihood_rolling(requests((text,), (TEXT[:90],)), disable_tqdm=True)
    assert found[0] == pytest.approx(by_hand, abs=1e-3)
    assert found[1] == pytest.approx(
        whole.loglikelihood_rolling(requests((TEXT[:90],)), disable_tqdm=True)[0], abs=1e-3
    )


def test_together_equals_alone(load: Load) -> None:
    together, alone = load(**KVCRUSH), load(**KVCRUSH, max_num_seqs=1)
    items = requests(*PAIRS)
    found = together.loglikelihood(items, disable_tqdm=True)
    singles = [alone.loglikelihood([item], disable_tqdm=True)[0] for item in items]
    assert [x for x, _ in found] == pytest.approx([x for x, _ in singles], abs=1e-3)
    assert [x for _, x in found] == [x for _, x in singles]


def test_a_policy_changes_every_score_of_a_long_context_and_only_those(load: Load) -> None:
    long, short = (5 * TEXT).strip(), "A short one:"
    items = requests((long, "a"), (long, "It slept."), (short, "a"))
    full, crushed = (load(**x).loglikelihood(items, disable_tqdm=True) for x in ({}, KVCRUSH))
    differences = [abs(a - b) for (a, _), (b, _) in zip(full, crushed, strict=True)]
    assert differences[0] > 1e-3
    assert differences[1] > 1e-3
    assert differences[2] < 1e-3
    # Without a tail the first token is predicted before the policy acts.
    first = load(**KVCRUSH, tail_tokens=0).loglikelihood(items[:1], disable_tqdm=True)
    assert first[0][0] == pytest.approx(full[0][0], abs=1e-3)


def test_scoring_leaves_nothing_in_the_cache(load: Load) -> None:
    model = load(**KVCRUSH)
    model.loglikelihood(requests(*PAIRS), disable_tqdm=True)
    use = model._pipeline.forced_engine("this test").cache.usage()
    assert (use.used_bytes, use.staging_bytes) == (0, 0)


@pytest.mark.parametrize("policy", [{}, KVCRUSH], ids=["none", "kvcrush"])
def test_answers_equal_the_pipelines(load: Load, policy: dict[str, Any]) -> None:
    prompts = [TEXT, 4 * TEXT, "Hello"]
    model = load(**policy)
    found = model.generate_until(requests(*((p, {"max_gen_toks": 20, "until": []}) for p in prompts)))
    cache: dict[str, Any] = {"key_precision": "f32", "value_precision": "f32"}
    if policy:
        settings = {key: value for key, value in KVCRUSH.items() if key != "policy"}
        cache["policy"] = {"name": "kvcrush", **settings}
    pipe = ContinuousBatchingPipeline(model._pipeline.folder, **_pipeline_options(cache))
    expected = pipe.generate(prompts, max_new_tokens=20, apply_chat_template=False)
    assert found == [result.m_generation_ids[0] for result in expected]


def test_until_cuts_before_the_first_stop(load: Load) -> None:
    model = load()
    [whole] = model.generate_until(requests((TEXT, {"max_gen_toks": 30})), disable_tqdm=True)
    stop = whole[8:10]
    for until in (stop, [stop, "never said"], [whole[20:23], stop]):
        [cut] = model.generate_until(requests((TEXT, {"max_gen_toks": 30, "until": until})), disable_tqdm=True)
        assert cut == whole[: whole.index(stop)]


def test_long_contexts_lose_their_beginning(load: Load) -> None:
    model = load(max_length=60)
    long, end = 3 * TEXT, (3 * TEXT)[-41:]  # a token is a byte; 61 with 20 of the answer
    options = {"max_gen_toks": 20}
    found = model.generate_until(requests((long, options), (end, options)), disable_tqdm=True)
    assert found[0] == found[1]
    scored = model.loglikelihood(requests((long + "is", " it"), ((long + "is")[-58:], " it")), disable_tqdm=True)
    assert scored[0][0] == pytest.approx(scored[1][0], abs=1e-3)
    with pytest.raises(RequestError, match="max_gen_toks must be at most max_length=60"):
        model.generate_until(requests(("Hello", {"max_gen_toks": 61})), disable_tqdm=True)


def test_chat_template_is_the_models(load: Load) -> None:
    model = load()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = "<|start|>system\nBe brief.<|end|>\n<|start|>user\nHi<|end|>\n"
    assert model.apply_chat_template(messages) == text + "<|start|>assistant\n"
    begun = [*messages, {"role": "assistant", "content": "The answer is"}]
    open_end = model.apply_chat_template(begun, add_generation_prompt=False)
    assert open_end == text + "<|start|>assistant\nThe answer is"
    assert "add_generation_prompt" in model.chat_template(True)
    assert model.chat_template(False) is None
    assert "/" not in model.tokenizer_name
    with pytest.raises(RequestError, match="without a name"):
        model.chat_template("other")


def test_genai_answers_but_does_not_score(folder: Path) -> None:
    model = model_class()(pretrained=str(folder), engine="genai", INFERENCE_PRECISION_HINT="f32")
    assert model.generate_until(requests((TEXT, {"max_gen_toks": 5})), disable_tqdm=True)[0]
    for method, args in (("loglikelihood", ("a", "b")), ("loglikelihood_rolling", ("a",))):
        with pytest.raises(RequestError, match=f"engine must be 'crush' for {method}, got 'genai'"):
            getattr(model, method)(requests(args), disable_tqdm=True)


def test_arguments_go_where_they_belong() -> None:
    configs = sort_arguments(
        {
            "pretrained": "x", "policy": "kvcrush", "kept": 0.5, "recent_tokens": 16, "cache_recent_tokens": 64,
            "value_precision": "u4", "max_num_seqs": 3, "INFERENCE_PRECISION_HINT": "f32", "batch_size": "8",
        }
    )  # fmt: skip
    assert configs.cache is not None
    assert configs.cache.eviction_policy is not None
    assert (configs.cache.value_precision, configs.cache.recent_tokens) == ("u4", 64)
    policy = configs.cache.eviction_policy
    assert (policy.budget.kept, policy.recent_tokens) == (0.5, 16)
    assert configs.scheduler is not None
    assert configs.scheduler.max_num_seqs == 3
    assert configs.properties == {"INFERENCE_PRECISION_HINT": "f32"}
    assert (configs.own.pretrained, configs.own.num_together) == ("x", 8)
    assert sort_arguments({"policy": None, "batch_size": 1}).own.num_together is None
    # What lm_eval's command line passes where it was told nothing.
    assert sort_arguments({"device": "cuda:0"}).own.device == "CPU"
    assert sort_arguments({"device": "GPU"}).own.device == "GPU"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"pretrianed": "x"}, "did you mean 'pretrained'"),
        ({"policy": "kvcrush", "kep": 0.5}, "setting of policy 'kvcrush' must be one of"),
        ({"policy": "kvcrunch"}, "did you mean 'kvcrush'"),
        ({"kept": 0.5}, "kept must be left out with policy 'none'"),
        ({"key_precision": "u3"}, "key_precision must be one of"),
        ({"tail_tokens": -1}, "tail_tokens must be an integer of at least 0"),
        ({"batch_size": "many"}, "batch_size must be an integer of at least 1"),
        ({"max_length": 1}, "max_length must be an integer of at least 2"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(CrushError, match=words):
        sort_arguments(arguments)


def test_options_of_tasks() -> None:
    assert generation_options({}, 9) == {"max_new_tokens": 9, "do_sample": False}
    task = {"until": ["\n", ""], "do_sample": False, "temperature": 0.0, "max_new_tokens": 4}
    assert generation_options(task, 9) == {"max_new_tokens": 4, "do_sample": False, "stop_strings": {"\n"}}
    assert generation_options({"temperature": 0.5, "top_p": 0.9}, 9) == {
        "max_new_tokens": 9, "do_sample": True, "temperature": 0.5, "top_p": 0.9,
    }  # fmt: skip
    with pytest.raises(RequestError, match="until must be a text or a list of texts, got 3"):
        generation_options({"until": 3}, 9)


def test_continuation_without_tokens_is_refused(load: Load) -> None:
    engine = load()._pipeline.forced_engine("this test")
    with pytest.raises(CrushError, match="continuation must have at least one token"):
        scores_of(engine, [([1, 2], [])], 1, 8)
    assert scores_of(engine, [], 1, 8) == []
    assert isinstance(scores_of(engine, [([1, 2], [3])], 1, 8)[0], Score)


def test_importing_needs_no_lm_eval_and_running_without_says_so() -> None:
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "import ov_kvcrush.eval.likelihood.lm_eval as adapter\n"
        "assert not [m for m in sys.modules if m in ('torch', 'datasets', 'transformers')]\n"
        "adapter.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "lm-eval must be installed" in done.stderr
    assert "pip install ov-kvcrush[lm-eval]" in done.stderr


def _tensor(ids: list[int]) -> Any:
    import openvino as ov

    return ov.Tensor(np.array([ids], np.int64))


def _pipeline_options(cache: dict[str, Any] | None = None) -> dict[str, Any]:
    properties = {name: value for name, value in EXACT.items() if name.isupper()}
    pair = {"key_precision": "f32", "value_precision": "f32"}
    return {"properties": properties, "cache_config": cache or pair}
