"""Servers that all files of one worker share: one with the default model, and a quick one for what needs no sense."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from served import Served, served

from ov_kvcrush import ContinuousBatchingPipeline
from ov_kvcrush.model.default import DEFAULT_MODEL_NAME
from ov_kvcrush.server.app import load_pipeline
from ov_kvcrush.server.settings import ServerSettings

KEYS = ("key-of-alice", "key-of-bob")


def _settings(model: Path, contexts: Path) -> ServerSettings:
    return ServerSettings(
        str(model), DEFAULT_MODEL_NAME, port=0, api_keys=KEYS, max_kv_mb=160, contexts_dir=contexts, max_waiting=64
    )


@pytest.fixture(scope="session")
def pipeline(smollm2: Path) -> ContinuousBatchingPipeline:
    return load_pipeline(_settings(smollm2, Path()))


@pytest.fixture(scope="session")
def server(
    smollm2: Path, pipeline: ContinuousBatchingPipeline, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with served(_settings(smollm2, tmp_path_factory.mktemp("contexts")), pipeline) as one:
        yield one


@pytest.fixture(scope="session")
def alice(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0], max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="session")
def quick_settings(shallow: Path, tmp_path_factory: pytest.TempPathFactory) -> ServerSettings:
    return _settings(shallow, tmp_path_factory.mktemp("contexts"))


@pytest.fixture(scope="session")
def quick_pipeline(quick_settings: ServerSettings) -> ContinuousBatchingPipeline:
    return load_pipeline(quick_settings)


@pytest.fixture(scope="session")
def quick(quick_settings: ServerSettings, quick_pipeline: ContinuousBatchingPipeline) -> Iterator[Served]:
    with served(quick_settings, quick_pipeline) as one:
        yield one
