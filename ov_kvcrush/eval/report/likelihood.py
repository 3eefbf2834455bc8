"""The next-token loss of the texts that a run of longgen forced."""

from __future__ import annotations

import math
from dataclasses import replace

from ov_kvcrush.eval.benchmarks.longgen import CONTINUE, SUITE
from ov_kvcrush.eval.runs.run_folder import Run
from ov_kvcrush.eval.statistics import ResultRow, result_rows


def losses(run: Run) -> list[ResultRow]:
    """Result rows of the mean next-token loss of `continue`, in nats; empty for a run without that task."""
    found = [p for p in run.predictions if p.task == CONTINUE]
    if run.config.suite != SUITE or not found:
        return []
    nats = [replace(p, score=-math.log(p.score)) for p in found]
    return result_rows(nats, run.config.settings, "perplexity", seed=run.config.seed)
