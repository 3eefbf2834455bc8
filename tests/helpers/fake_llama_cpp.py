"""llama-cpp-python as far as the bench uses it: a package that notes what it is asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VERSION = "0.3.99"
_CODE = """
import ctypes, json, pathlib

LOG = pathlib.Path(__file__).with_name("log.jsonl")

def note(**what):
    with LOG.open("a") as file:
        file.write(json.dumps(what) + "\\n")

class Llama:
    def __init__(self, model_path, **options):
        if not pathlib.Path(model_path).is_file():
            raise ValueError(f"no file {model_path}")
        note(model=model_path, options=options)
        self.ctx = self
        self.options = options
        self.tokens = []

    def reset(self):
        note(reset=True)
        self.tokens = []

    def n_vocab(self):
        return 100

    def eval(self, tokens):
        assert 0 < len(tokens) <= self.options["n_batch"]
        self.tokens += tokens
        assert len(self.tokens) <= self.options["n_ctx"]
        note(eval=tokens)

def llama_get_logits(ctx):
    logits = (ctypes.c_float * 100)()
    logits[len(ctx.tokens) % 100] = 1
    return ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))

def llama_state_seq_get_size(ctx, sequence):
    return 10 * len(ctx.tokens)
"""


def write_fake_llama_cpp(folder: Path) -> Path:
    """Install it in `folder`, which is to stand in sys.path; return the file of its notes, a JSON line each.

    The likeliest token is the number of tokens that were read, below 100.
    """
    package = folder / "llama_cpp"
    package.mkdir()
    (package / "__init__.py").write_text(_CODE)
    about = folder / f"llama_cpp_python-{VERSION}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {VERSION}\n")
    return package / "log.jsonl"


def notes(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]
