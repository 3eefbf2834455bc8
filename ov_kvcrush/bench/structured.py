"""What structured output costs: `python -m ov_kvcrush.bench.structured [MODEL]`.

Pairs of batches of one model, with and without a grammar for each request, taken in turns: other load of the machine
meets both. Answers of both have the same number of tokens.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Annotated, Any

import openvino_genai as ov_genai
import typer

from ov_kvcrush.engine.engine import Engine
from ov_kvcrush.pipelines.continuous_batching import ContinuousBatchingPipeline


def schema(i: int) -> str:
    """A schema of its own for each request, whose answers do not end early."""
    item = {
        "type": "object",
        "properties": {f"name{i}": {"type": "string"}, "age": {"type": "integer"}, "tags": {"type": "array"}},
        "required": [f"name{i}", "age", "tags"],
        "additionalProperties": False,
    }
    return json.dumps({"type": "array", "items": item, "minItems": 1000})


def measure(
    model: Annotated[Path | None, typer.Argument(help="Model folder. Default: SmolLM2-135M.")] = None,
    batch: Annotated[int, typer.Option(help="Requests that run together.")] = 8,
    pairs: Annotated[int, typer.Option(help="Runs of each kind.")] = 7,
    tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 96,
    threads: Annotated[int, typer.Option(help="Of the inference; 0 = as many as there are.")] = 0,
) -> None:
    """Print TPOT with and without a grammar, and what the masks took."""
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads} if threads else {}
    pipe = ContinuousBatchingPipeline(model, **properties)
    engine = pipe._backend
    assert isinstance(engine, Engine)
    prompts = [f"Describe {i + 2} people." for i in range(batch)]
    free, bound = [], []
    for i in range(batch):
        free.append(ov_genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True))
        bound.append(ov_genai.GenerationConfig(max_new_tokens=tokens))
        bound[-1].structured_output_config = ov_genai.StructuredOutputConfig(json_schema=schema(i))
    start = time.perf_counter()
    pipe.generate(prompts[:1], [ov_genai.GenerationConfig(max_new_tokens=1)])
    pipe.generate(prompts, bound)
    print(f"first run, with the vocabulary and {batch} grammars: {time.perf_counter() - start:.2f} s")
    thread = engine.grammars.thread if engine.grammars else None
    assert thread is not None
    work, wait = thread.work_s, thread.wait_s
    found: tuple[list[float], list[float]] = ([], [])
    for pair in range(pairs):
        for kind in (0, 1) if pair % 2 == 0 else (1, 0):
            results = pipe.generate(prompts, (free, bound)[kind])
            found[kind].append(statistics.mean(r.perf_metrics.get_tpot().mean for r in results))
    steps = pairs * tokens
    tpot = [statistics.median(times) for times in found]
    ratio = statistics.median(b / a for a, b in zip(*found, strict=True))
    print(f"TPOT without {tpot[0]:.1f} ms, with {tpot[1]:.1f} ms, ratio of the pairs {ratio:.3f} (median of {pairs})")
    print("ratios", " ".join(f"{b / a:.3f}" for a, b in zip(*found, strict=True)))
    step_ms = tpot[1] * batch  # a step gives each request a token, and TPOT counts those of all
    for name, seconds in (("waited for masks", thread.wait_s - wait), ("masks, beside it", thread.work_s - work)):
        print(f"{name}: {1000 * seconds / steps:.3f} ms a step, {100_000 * seconds / steps / step_ms:.2f} % of it")


if __name__ == "__main__":
    typer.run(measure)
