"""The clients of docs/clients.md: each block is run as the page has it, against a server that lives."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from served import Served

KEY = "key-of-alice"
TEXT = (Path(__file__).parents[2] / "docs" / "clients.md").read_text()
HEADINGS = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
BLOCKS = [
    pytest.param(language, block, id=f"{heading.split()[0]}-{number}")
    for heading in HEADINGS
    for number, (language, block) in enumerate(re.findall(r"^```(\w+)\n(.*?)^```", heading, re.MULTILINE | re.DOTALL))
]


def run(language: str, block: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What it prints. Raises what it raises."""
    if language == "sh":
        if shutil.which("curl") is None:
            pytest.fail("curl must be installed: apt-get install -y curl")
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], capture_output=True, text=True, cwd=folder)
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert language == "python"
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(block, "docs/clients.md", "exec"), {"__name__": "clients"})
    return printed.getvalue()


def test_every_client_has_a_block() -> None:
    assert [heading.splitlines()[0] for heading in HEADINGS] == ["curl", "openai", "langchain-openai", "llama-index"]
    assert "KEY" not in re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize(("language", "block"), BLOCKS)
def test_a_block_of_the_docs_runs_and_answers(
    language: str, block: str, server: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "http://127.0.0.1:8000/v1" in block
    there = block.replace("http://127.0.0.1:8000/v1", f"{server.url}/v1").replace("KEY", KEY)
    before = contexts_of(server)
    printed = run(language, there, tmp_path, monkeypatch)
    if "-sN" in block:
        printed = streamed(printed)
    assert ("1931" if "context" in block and "pump" in block else "Paris") in printed
    assert contexts_of(server) == before  # it deletes what it makes


def contexts_of(server: Served) -> list[str]:
    found = httpx.get(f"{server.url}/v1/contexts", headers={"Authorization": f"Bearer {KEY}"})
    return [context["id"] for context in found.json()["data"]]


def streamed(printed: str) -> str:
    """The text of server-sent events, which end as OpenAI's do and tell their usage."""
    data = [line.removeprefix("data: ") for line in printed.splitlines() if line]
    assert data[-1] == "[DONE]"
    chunks = [json.loads(line) for line in data[:-1]]
    assert chunks[-1]["usage"]["completion_tokens"] > 0
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
