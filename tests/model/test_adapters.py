"""LoRA adapters: what Hugging Face with peft and openvino_genai make of the same files, row by row of one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as stock
import pytest
from both_libraries import EXACT
from safetensors.numpy import load_file, save_file
from tiny_adapters import MODULES, tiny_adapters

import ov_kvcrush as ours

IDS = np.arange(40, 60)
NUM_NEW = 6
WEIGHT = "base_model.model.model.layers.1.mlp.down_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def files(tiny_hf: Callable[[str], Path], once: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Path]:
    """Two adapters of the tiny llama, made by peft."""

    folder = once("adapters", lambda folder: tiny_adapters(tiny_hf("llama"), folder))
    return {name: folder / name / "adapter_model.safetensors" for name in MODULES}


@pytest.fixture(scope="module")
def adapters(files: dict[str, Path]) -> dict[str, ours.Adapter]:
    return {name: ours.Adapter(path) for name, path in files.items()}


@pytest.fixture(scope="module")
def pipe(tiny_ir: Callable[[str], Path], adapters: dict[str, ours.Adapter]) -> ours.ContinuousBatchingPipeline:
    """It runs with half of `a` where a request says nothing."""
    config = ours.AdapterConfig([(adapters["a"], 0.5), (adapters["b"], 0.0)])
    properties = {"adapters": config, **EXACT}
    return ours.ContinuousBatchingPipeline(
        tiny_ir("llama"), {"enable_prefix_caching": True}, "CPU", properties, cache_config={"recent_tokens": 4096}
    )


def generation_config(adapters: Any = None, **options: Any) -> stock.GenerationConfig:
    config = stock.GenerationConfig(max_new_tokens=NUM_NEW, ignore_eos=True, logprobs=1, **options)
    config.adapters = adapters
    return config


def answers(pipe: Any, *configs: stock.GenerationConfig) -> list[tuple[list[list[int]], list[float]]]:
    if isinstance(pipe, ours.ContinuousBatchingPipeline):
        pipe._backend.clear_prefixes()
    results = pipe.generate([ov.Tensor(IDS[None])] * len(configs), list(configs))
    return [(result.m_generation_ids, result.m_scores) for result in results]


def assert_same(found: tuple[Any, Any], expected: tuple[Any, Any]) -> None:
    assert found[0] == expected[0]
    np.testing.assert_allclose(found[1], expected[1], rtol=1e-4)


def asked(lib: Any, a: Any, b: Any) -> list[Any]:
    """Configs of either library: the default, none, each, both."""
    config = lib.AdapterConfig
    return [config(), config(a, 2.0), config(b), config([(a, 0.7), (b, -0.3)]), config([a, b])]


def by_hugging_face(folder: Path, path: Path) -> tuple[list[list[int]], list[float]]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), path.parent
    ).eval()
    ids = torch.tensor(IDS[None])
    told = {"do_sample": False, "eos_token_id": None, "pad_token_id": 257}
    found = model.generate(
        input_ids=ids, max_new_tokens=NUM_NEW, return_dict_in_generate=True, output_logits=True, **told
    )
    score = sum(torch.log_softmax(row[0].double(), -1).max().item() for row in found.logits)
    return [found.sequences[0, len(IDS) :].tolist()], [score]


def test_rows_of_one_step_are_what_hugging_face_computes(
    pipe: Any, adapters: dict[str, ours.Adapter], files: dict[str, Path], tiny_hf: Callable[[str], Path]
) -> None:
    configs = [generation_config(ours.AdapterConfig(x, x.scaling)) for x in adapters.values()]
    assert [x.scaling for x in adapters.values()] == [2.0, 0.5]
    for found, path in zip(answers(pipe, *configs), files.values(), strict=True):
        assert_same(found, by_hugging_face(tiny_hf("llama"), path))


def test_answers_are_those_of_openvino_genai(
    pipe: Any, adapters: dict[str, ours.Adapter], files: dict[str, Path], tiny_ir: Callable[[str], Path]
) -> None:
    a, b = (stock.Adapter(str(path)) for path in files.values())
    registered = stock.AdapterConfig([(a, 0.5), (b, 0.0)])
    reference = stock.ContinuousBatchingPipeline(
        tiny_ir("llama"), stock.SchedulerConfig(), "CPU", {"adapters": registered, **EXACT}
    )
    expected = [answers(reference, generation_config(config))[0] for config in [registered, *asked(stock, a, b)]]
    found = answers(pipe, *(generation_config(config) for config in [None, *asked(ours, *adapters.values())]))
    assert len({str(tokens) for tokens, _ in found}) == len(found), "the adapters must matter"
    for mine, theirs in zip(found, expected, strict=True):
        assert_same(mine, theirs)


def test_a_batch_of_different_adapters_is_each_alone(
    pipe: Any, adapters: dict[str, ours.Adapter], tiny_ir: Callable[[str], Path]
) -> None:
    configs = [generation_config(config) for config in asked(ours, *adapters.values())]
    together = answers(pipe, *configs)
    for found, config in zip(together, configs, strict=True):
        assert_same(found, answers(pipe, config)[0])
    plain = ours.ContinuousBatchingPipeline(tiny_ir("llama"), {}, "CPU", dict(EXACT))
    assert_same(together[0], answers(plain, generation_config())[0])


def test_beams_and_guessed_tokens_run_with_the_adapters(
    adapters: dict[str, ours.Adapter], files: dict[str, Path], tiny_ir: Callable[[str], Path], pipe: Any
) -> None:
    """In PagedAttention's own blocks, too."""
    config = ours.AdapterConfig(adapters["b"])
    others = ours.ContinuousBatchingPipeline(
        tiny_ir("llama"), {}, "CPU", {"adapters": config, **EXACT}, prompt_lookup=True,
        cache_config={"attention": "paged"},
    )  # fmt: skip
    assert_same(answers(others, generation_config())[0], answers(pipe, generation_config(config))[0])
    beams = generation_config(config, num_beams=3, num_return_sequences=2)
    assert_same(answers(others, beams)[0], answers(pipe, beams)[0])


def test_prefixes_serve_only_requests_with_the_same_adapters(pipe: Any, adapters: dict[str, ours.Adapter]) -> None:
    none, a = generation_config(ours.AdapterConfig()), generation_config(ours.AdapterConfig(adapters["a"]))
    half = generation_config(ours.AdapterConfig(adapters["a"], 0.25))
    fresh = {id(config): answers(pipe, config)[0] for config in (none, a, half)}
    pipe._backend.clear_prefixes()
    reused = []
    for number, config in enumerate((none, a, half, a, none)):
        handle = pipe.add_request(number, ov.Tensor(IDS[None]), config)
        output = handle.read_all()[0]
        assert output.generated_ids == fresh[id(config)][0][0]
        reused.append(handle.get_stats().num_reused_tokens > 0)
    assert reused == [False, False, False, True, True]


def test_contexts_keep_their_adapters(
    pipe: Any, adapters: dict[str, ours.Adapter], tiny_ir: Callable[[str], Path], tmp_path: Path
) -> None:
    config = ours.AdapterConfig(adapters["a"], 2.0)

    def ask(context: ours.Context, adapters: Any = None) -> Any:
        handle = pipe.add_request(0, " and you?", generation_config(adapters), context=context)
        return handle.read_all()[0].generated_ids

    with pipe.compress("Who are we", policy="none", adapters=config) as context:
        answer = ask(context)
        assert ask(context, config) == answer
        with pytest.raises(ours.RequestError, match=r"adapters must be those that the context was read with, .*:2\.0"):
            ask(context, ours.AdapterConfig(adapters["a"]))
        with pipe.compress("Who are we", policy="none", adapters=ours.AdapterConfig()) as other:
            assert ask(other) != answer
        context.save(tmp_path / "context")
    with ours.Context.load(tmp_path / "context", pipe) as loaded:
        assert ask(loaded) == answer
        with pytest.raises(ours.RequestError, match=r"read with, .*:2\.0, got none"):
            ask(loaded, ours.AdapterConfig())
    plain = ours.LLMPipeline(tiny_ir("llama"), "CPU", cache_config={"recent_tokens": 4096}, **EXACT)
    with pytest.raises(ours.ContextFileError, match=f"adapters of the context .* {adapters['a'].digest}"):
        ours.Context.load(tmp_path / "context", plain)


def test_what_a_request_may_not_ask_is_refused_by_name(
    pipe: Any, adapters: dict[str, ours.Adapter], files: dict[str, Path]
) -> None:
    again = ours.Adapter(files["a"])
    for config, message in (
        (ours.AdapterConfig(again), f"pipeline was made with, .*{files['b'].parent.name}.*, got .*{files['a']}"),
        (ours.AdapterConfig(adapters["b"], float("nan")), f"alpha of adapter '{files['b']}' must be a finite number"),
        (stock.AdapterConfig(stock.Adapter(str(files["a"]))), "must be an ov_kvcrush.AdapterConfig"),
        ("a", "adapters must be an AdapterConfig, got str"),
    ):
        with pytest.raises(ours.CrushError, match=message):
            pipe.generate([ov.Tensor(IDS[None])], adapters=config)
    with pytest.raises(ours.RequestError, match=r"made with, .*, got others"):
        pipe.generate([ov.Tensor(IDS[None])], generation_config(ours.AdapterConfig(again)))
    with pytest.raises(ours.CrushError, match=r"of ov_kvcrush\.Adapter"):
        ours.AdapterConfig([adapters["a"], stock.Adapter(str(files["a"]))])


def test_the_other_engine_refuses_them(adapters: dict[str, ours.Adapter], tiny_ir: Callable[[str], Path]) -> None:
    """openvino_genai takes them, and does not heed them in requests that are added."""
    config = ours.AdapterConfig(adapters["a"])
    with pytest.raises(ours.CrushError, match="adapters must be empty with engine='genai'"):
        ours.LLMPipeline(tiny_ir("llama"), "CPU", engine="genai", adapters=config)
    other = ours.LLMPipeline(tiny_ir("llama"), "CPU", engine="genai", adapters=ours.AdapterConfig(), **EXACT)
    with pytest.raises(ours.RequestError, match="adapters must be empty with engine='genai'"):
        other.generate(ov.Tensor(IDS[None]), adapters=config)


def test_a_config_follows_its_changes(adapters: dict[str, ours.Adapter]) -> None:
    a, b = adapters.values()
    config = ours.AdapterConfig(a)
    assert config.add(b, 0.5) is config
    assert config.get_adapters_and_alphas() == [(a, 1.0), (b, 0.5)]
    assert config.remove(a).set_alpha(b, 2.0).get_adapters_and_alphas() == [(b, 2.0)]
    config.set_adapters_and_alphas([(a, 3.0)])
    assert config.get_adapters_and_alphas() == [(a, 3.0)]
    assert not ours.AdapterConfig().get_adapters()


Tensors = dict[str, np.ndarray]
DOWN_A, DOWN_B = WEIGHT.format("A"), WEIGHT.format("B")
BAD_FILES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "dora": (lambda x: {**x, DOWN_A.replace("lora_A", "lora_magnitude_vector"): x[DOWN_A][0]}, "lora_magnitude_vector"),
    "whole modules": (
        lambda x: {**x, "base_model.model.lm_head.weight": x[DOWN_A]},
        "got 'base.*lm_head.weight'",
    ),
    "no A": (lambda x: {k: v for k, v in x.items() if k != DOWN_A}, f"must have the tensor '{DOWN_A}'"),
    "no B": (lambda x: {k: v for k, v in x.items() if k != DOWN_B}, f"must have the tensor '{DOWN_B}'"),
    "ranks": (lambda x: {**x, DOWN_B: x[DOWN_B][:, :3].copy()}, f"'{DOWN_B}' .* must be .outputs, 4. .*, got .128, 3."),
    "not finite": (lambda x: {**x, DOWN_B: x[DOWN_B] * np.float32(np.nan)}, f"'{DOWN_B}' .* finite"),
    "integers": (lambda x: {**x, DOWN_A: x[DOWN_A].astype(np.int32)}, f"'{DOWN_A}' .* must be of F64.*, got I32"),
    "nothing": (lambda x: {}, "must hold LoRA, got a file without any"),
}
OTHER_MODELS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "layers": (lambda x: {k.replace("layers.1.", "layers.7."): v for k, v in x.items()}, r"layers\.7\..*lora_A"),
    "modules": (lambda x: {k.replace("down_proj", "fc2"): v for k, v in x.items()}, "no linear layer .*fc2'"),
    "inputs": (lambda x: {**x, DOWN_A: x[DOWN_A][:, :100].copy()}, f"'{DOWN_A}' .* must be .4, 192. .*got .4, 100."),
    "outputs": (lambda x: {**x, DOWN_B: x[DOWN_B][:9].copy()}, f"'{DOWN_B}' .* must be .128, 4. .*got .9, 4."),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_hold_something_else_are_refused(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    change, message = BAD_FILES[name]
    save_file(change(load_file(files["a"])), tmp_path / "adapter.safetensors")
    with pytest.raises(ours.CrushError, match=message):
        ours.Adapter(tmp_path / "adapter.safetensors")


def test_what_is_no_file_of_tensors_is_refused(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "cut").write_bytes(files["a"].read_bytes()[:-9])
    with pytest.raises(ours.CrushError, match=r"cut' must be a safetensors file"):
        ours.Adapter(tmp_path / "cut")
    with pytest.raises(ours.CrushError, match=r"must be a file that can be read, got .*none': No such file"):
        ours.Adapter(tmp_path / "none")
    with pytest.raises(ours.CrushError, match=r"adapter_config\.json must be PEFT's"):
        _ = ours.Adapter(_copy(files["a"], tmp_path)).scaling


def _copy(file: Path, folder: Path) -> Path:
    path = folder / file.name
    path.write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_adapters_of_another_model_are_refused(
    name: str, files: dict[str, Path], tmp_path: Path, tiny_ir: Callable[[str], Path]
) -> None:
    change, message = OTHER_MODELS[name]
    save_file(change(load_file(files["a"])), tmp_path / "adapter.safetensors")
    config = ours.AdapterConfig(ours.Adapter(tmp_path / "adapter.safetensors"))
    with pytest.raises(ours.ModelError, match=message):
        ours.LLMPipeline(tiny_ir("llama"), "CPU", adapters=config)


def test_models_without_names_of_layers_are_refused(adapters: dict[str, ours.Adapter], shallow: Path) -> None:
    with pytest.raises(ours.ModelError, match="from GGUF does not name its layers"):
        ours.LLMPipeline(shallow, "CPU", adapters=ours.AdapterConfig(adapters["a"]))


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_half_precision_is_read(dtype: str, files: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file as save_torch

    kind = torch.float16 if dtype == "F16" else torch.bfloat16
    tensors = {name: torch.tensor(values).to(kind) for name, values in load_file(files["a"]).items()}
    save_torch(tensors, tmp_path / "adapter.safetensors")
    layer = ours.Adapter(tmp_path / "adapter.safetensors").layers["model.layers.1.mlp.down_proj"]
    np.testing.assert_array_equal(layer.a, tensors[DOWN_A].float().numpy())
    np.testing.assert_array_equal(layer.b, tensors[DOWN_B].float().numpy())
