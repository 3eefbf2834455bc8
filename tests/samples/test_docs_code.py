"""The Python blocks of the docs run, one after another, as the page has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("page", ["README.md", "docs/coming_from_openvino_genai.md", "docs/structured_output.md"])
def test_blocks_of_a_page(page: str, shallow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MODEL, and "path/to/model", is the folder of a model."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"MODEL": str(shallow)}
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        code = block[1].replace('"path/to/model"', "MODEL")
        exec(compile("\n" * line + code, str(ROOT / page), "exec"), names)
