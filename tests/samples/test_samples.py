"""The samples run as their docstrings say, on the default model; where nobody asks for sense, on some of its layers."""

from __future__ import annotations

import re
from pathlib import Path

from sample_runs import run_sample


def test_greedy_generation(smollm2: Path) -> None:
    out = run_sample("greedy_generation.py")
    assert re.search(r"Answer: .*Paris", out)
    assert re.search(r"\d+ tokens in, \d+ tokens out", out)


def test_greedy_generation_in_a_budget_of_bytes(shallow: Path) -> None:
    assert re.search(r"Answer: \S", run_sample("greedy_generation.py", str(shallow), "--budget", "1/4"))


def test_chat(shallow: Path) -> None:
    out = run_sample("chat.py", str(shallow), stdin="My name is Anna.\nWhat is my name?\n")
    assert len(re.findall(r"Model: \S", out)) == 2
    (first_input, first_reused), (second_input, second_reused) = [
        (int(a), int(b)) for a, b in re.findall(r"\((\d+) tokens in, (\d+) of them reused\)", out)
    ]
    assert first_reused == 0
    assert first_input <= second_reused < second_input


def test_streaming(smollm2: Path) -> None:
    out = run_sample("streaming.py", str(smollm2), "--sentences", "2")
    text, _, last = out.rpartition("\n\n")
    assert text.count(".") >= 2
    assert last.strip() == f"The answer that `generate` returns has {len(text)} characters."


def test_continuous_batching(shallow: Path) -> None:
    out = run_sample("continuous_batching.py", str(shallow))
    arrivals = [int(step) for step in re.findall(r"step (\d+): request \d arrives", out)]
    ends = [int(step) for step in re.findall(r"step (\d+): request \d ends", out)]
    assert len(arrivals) == len(ends) == 4
    assert arrivals[1] < ends[0]  # one arrived while another ran
    assert out.rstrip().endswith("blocks in use: 0")


def test_many_users(shallow: Path) -> None:
    out = run_sample("many_users.py", str(shallow), "--users", "5")
    assert len(re.findall(r"user \d: first token", out)) == 5
    assert len(re.findall(r"user \d: .* ['\"].+['\"] \((stop|length)\)", out)) == 5
