"""One server with the default model for each file of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from served import Served, served

from ov_kvcrush import ContinuousBatchingPipeline
from ov_kvcrush.server.app import load_pipeline
from ov_kvcrush.server.settings import ServerSettings

KEYS = ("key-of-alice", "key-of-bob")
MODEL = "smol"


@pytest.fixture(scope="module")
def settings(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    folder = tmp_path_factory.mktemp("contexts")
    return ServerSettings(
        str(smollm2), MODEL, port=0, api_keys=KEYS, max_kv_mb=160, contexts_dir=folder, max_waiting=64
    )


@pytest.fixture(scope="module")
def pipeline(settings: ServerSettings) -> ContinuousBatchingPipeline:
    return load_pipeline(settings)


@pytest.fixture(scope="module")
def server(settings: ServerSettings, pipeline: ContinuousBatchingPipeline) -> Iterator[Served]:
    with served(settings, pipeline) as one:
        yield one


@pytest.fixture(scope="module")
def alice(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0], max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def bob(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[1], max_retries=0, timeout=60) as client:
        yield client
