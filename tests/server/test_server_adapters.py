"""LoRA adapters of a server: models by their names, each answering as the pipeline does with that adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import openvino as ov
import pytest
from served import Served, served
from tiny_adapters import MODULES, RANKS, tiny_adapters

import ov_kvcrush as ours
from ov_kvcrush.server.app import load_pipeline
from ov_kvcrush.server.settings import ServerSettings

PROMPT = list(range(40, 60))


@pytest.fixture(scope="module")
def settings(
    tiny_ir: Callable[[str], Path],
    tiny_hf: Callable[[str], Path],
    once: Callable[[str, Callable[[Path], object]], Path],
) -> ServerSettings:
    """One adapter is given as PEFT's folder, the other as the file in it."""
    folder = once("adapters", lambda folder: tiny_adapters(tiny_hf("llama"), folder))
    adapters = (f"sql={folder / 'a'}", f"poet={folder / 'b' / 'adapter_model.safetensors'}")
    return ServerSettings(str(tiny_ir("llama")), "base", port=0, max_kv_mb=64, adapters=adapters)


@pytest.fixture(scope="module")
def pipeline(settings: ServerSettings) -> ours.ContinuousBatchingPipeline:
    return load_pipeline(settings)


@pytest.fixture(scope="module")
def server(settings: ServerSettings, pipeline: ours.ContinuousBatchingPipeline) -> Iterator[Served]:
    with served(settings, pipeline) as one:
        yield one


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as one:
        yield one


def complete(client: openai.OpenAI, model: str) -> str:
    extra = {"ignore_eos": True}
    answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=8, temperature=0, extra_body=extra)
    assert answer.model == model
    return str(answer.choices[0].text)


def expected(pipeline: ours.ContinuousBatchingPipeline, index: int | None) -> str:
    """index: of the adapter, None = the model alone."""
    config = ours.GenerationConfig(max_new_tokens=8, ignore_eos=True)
    options: dict[str, Any] = {}
    if index is not None:
        rank, alpha = RANKS[list(MODULES)[index]]
        options["adapters"] = ours.AdapterConfig(pipeline.adapters[index], alpha / rank)
    ids = pipeline.generate([ov.Tensor(np.array(PROMPT)[None])], config, **options)[0].m_generation_ids[0]
    return str(pipeline.get_tokenizer().decode(ids))


def test_adapters_are_models(client: openai.OpenAI) -> None:
    found = {model.id: getattr(model, "parent", None) for model in client.models.list()}
    assert found == {"base": None, "sql": "base", "poet": "base"}
    assert client.models.retrieve("poet").id == "poet"


def test_each_answers_as_the_pipeline_does(client: openai.OpenAI, pipeline: ours.ContinuousBatchingPipeline) -> None:
    """Also where they are asked at once, and the cached prefix of another would begin like theirs."""
    wanted = {name: expected(pipeline, i) for name, i in (("base", None), ("sql", 0), ("poet", 1))}
    assert len(set(wanted.values())) == 3
    names = [*wanted] * 3
    with ThreadPoolExecutor(len(names)) as threads:
        said = list(threads.map(lambda name: complete(client, name), names))
    assert said == [wanted[name] for name in names]


def test_every_path_takes_them(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Hello"}]
    chat = client.chat.completions.create(model="sql", messages=messages, max_completion_tokens=3)
    assert chat.model == "sql"
    chunks = list(client.chat.completions.create(model="sql", messages=messages, max_completion_tokens=3, stream=True))
    assert {chunk.model for chunk in chunks} == {"sql"}
    assert client.responses.create(model="poet", input="Hello", max_output_tokens=3).model == "poet"


def test_other_names_are_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="model must be one of base, sql, poet, got 'prose'"):
        complete(client, "prose")


def test_a_context_belongs_to_the_model_that_read_it(server: Served, client: openai.OpenAI) -> None:
    made: Any = client.post("/contexts", body={"text": "The harbour has nine boats."}, cast_to=object)
    asked: Any = {"prompt": "How many?", "max_tokens": 2, "extra_body": {"context": made["id"]}}
    assert client.completions.create(model="base", **asked).model == "base"
    with pytest.raises(openai.BadRequestError, match="adapters"):
        client.completions.create(model="sql", **asked)


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        (("sql",), "adapters must be NAME=PATH, got 'sql'"),
        (("=path",), "adapters must be NAME=PATH, got '=path'"),
        (("a=x", "a=y"), "adapters must have names of their own beside the model's, got 'a' twice"),
        (("base=x",), "adapters must have names of their own beside the model's, got 'base' twice"),
    ],
)
def test_bad_settings_are_refused(adapters: tuple[str, ...], message: str) -> None:
    with pytest.raises(ours.CrushError, match=message):
        ServerSettings(alias="base", adapters=adapters)


def test_what_cannot_be_served_is_refused(settings: ServerSettings, tmp_path: Path) -> None:
    with pytest.raises(ours.CrushError, match="adapter must be a file that can be read"):
        load_pipeline(ServerSettings(settings.model, adapters=(f"a={tmp_path / 'none'}",)))
