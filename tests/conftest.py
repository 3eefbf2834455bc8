"""Fixtures that several test files share."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import covering  # noqa: F401, registers the profiles
import pytest
from filelock import FileLock
from hypothesis import settings
from shallow_model import shallow_model
from tiny_models import tiny_model

from model_export import export_model
from ov_kvcrush.model.default import default_model_path

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported: no test asks the hub for anything


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exhaustive", action="store_true", help="run the long combinations too")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("hypothesis_profile", default=None):
        settings.load_profile("exhaustive" if config.getoption("exhaustive") else "default-run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("exhaustive"):
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]


def pytest_collection_finish(session: pytest.Session) -> None:
    """Imports and test items live to the end: an export, which collects garbage four times, need not look at them."""
    if any("tiny_hf" in getattr(item, "fixturenames", ()) for item in session.items):
        import optimum.exporters.openvino.__main__  # noqa: F401
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Return a function from a name and what fills a folder to that folder, which one worker of the run fills once.

    In the folder OV_KVCRUSH_TEST_MODELS, where that is set: several runs of the same code can share it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    if "OV_KVCRUSH_TEST_MODELS" in os.environ:
        shared = Path(os.environ["OV_KVCRUSH_TEST_MODELS"])

    def fill(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared / name
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{folder}.lock"):
                if not folder.exists():
                    part = folder.with_name(f"{folder.name}.part")
                    make(part)
                    part.rename(folder)
        return folder

    return fill


@pytest.fixture(scope="session")
def tiny_hf(once: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[str], Path]:
    """Return a function from a kind (see tiny_models.KINDS) to its Hugging Face folder, built once per run."""
    return lambda kind: once(f"hf/{kind}", lambda folder: tiny_model(kind, folder))


@pytest.fixture(scope="session")
def tiny_ir(
    tiny_hf: Callable[[str], Path], once: Callable[[str, Callable[[Path], object]], Path]
) -> Callable[[str], Path]:
    """Return a function from a kind to its exported fp32 OpenVINO folder, exported once per run."""
    return lambda kind: once(f"ir/{kind}", lambda out: export_model(tiny_hf(kind), out, weight_format="fp32"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of the default model, from the user's cache."""
    return default_model_path()


@pytest.fixture(scope="session")
def shallow(once: Callable[[str, Callable[[Path], object]], Path], smollm2: Path) -> Path:
    """The default model with 6 of its 30 layers: real text, where nobody asks whether the answer makes sense."""
    return once("shallow", lambda folder: shallow_model(smollm2, folder))
