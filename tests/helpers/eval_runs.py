"""Answers of a run that nobody has to wait for: scores drawn at random, the same for the same seed."""

from __future__ import annotations

import random
from collections.abc import Sequence

from ov_kvcrush.eval.records import Prediction, Setting
from ov_kvcrush.eval.runs.run_config import RunConfig
from ov_kvcrush.eval.runs.run_folder import RunFolder

FULL = Setting(engine="crush", policy="none", key_precision="bf16", value_precision="bf16")
U8 = {"key_precision": "u8", "value_precision": "u8"}
U4 = {"key_precision": "u8", "value_precision": "u4"}
SETTINGS = (
    FULL,
    Setting(engine="crush", policy="none", **U8),
    Setting(engine="crush", policy="kvcrush", kept=0.25, **U8),
    Setting(engine="crush", policy="kvcrush", kept=0.25, **U4),
    Setting(engine="crush", policy="kvcrush", kept=0.5, policy_settings={"share": 0.5}, **U8),
    Setting(engine="crush", policy="snapkv", kept_tokens=64, **U8),
    Setting(engine="crush", policy="random", kept=0.1, **U8),
    Setting(engine="genai", policy="none", **U8),
    Setting(engine="genai", policy="kvcrush", kept=0.25, **U8),
    Setting(engine="crush", policy="snapkv", budget=1 / 6, **U8),
)
MACHINE = {
    "cpu": "a CPU",
    "threads": 2,
    "os": "an OS",
    "python": "3.11",
    "kernel": "CrushAttention avx2",
    "versions": {"openvino": "1", "ov_kvcrush": "0"},
}


def answers(
    settings: Sequence[Setting] = SETTINGS, tasks: Sequence[str] = ("qa", "code"), items: int = 6, seed: int = 0
) -> list[Prediction]:
    """One to three questions for each item, in an order in which a run might answer them."""
    rng = random.Random(seed)
    made = []
    for task in tasks:
        for item in range(items):
            prompt = rng.randrange(200, 900)
            for question in range(1 + item % 3):
                base = rng.random()
                for setting in settings:
                    kept = prompt * (setting.kept or 1.0) if setting.kept_tokens is None else float(setting.kept_tokens)
                    score = base if setting.policy == "none" and setting.engine == "crush" else rng.random()
                    made.append(
                        Prediction(
                            item_id=item_id(task, item),
                            task=task,
                            question_index=question,
                            turn=question,
                            setting_key=setting.key,
                            text=f"answer {score} \u2028\n\ud800 |",
                            score=score,
                            kept_tokens=kept,
                            prompt_tokens=prompt,
                            bytes=int(kept * (128 if setting is FULL else 70)),
                            seconds=0.5,
                        )
                    )
    return made


def item_id(task: str, number: int) -> str:
    """As the suites name their items; those of the needle grid tell their place."""
    return f"needle-{1024 * (1 + number % 2)}-{50 * (number // 2)}-0" if task == "needle" else f"{task}-{number}"


def config(settings: Sequence[Setting] = SETTINGS, **changes: object) -> RunConfig:
    """Of a run that these answers may belong to."""
    values = {
        "command": "ov_kvcrush-eval ruler --model /models/tiny-int8 --out '/a b/c'",
        "suite": "ruler",
        "model": "/models/tiny-int8",
        "fingerprint": "abc123",
        "settings": tuple(settings),
        "num_items": 12,
        "seed": 7,
        "environment": MACHINE,
        "options": {"length": 4096, "tasks": ["qa", "code"]},
    }
    return RunConfig(**{**values, **changes})  # type: ignore[arg-type]


def stop_at(folder: RunFolder, count: int | None) -> None:
    """Let Ctrl-C come in place of the answer behind `count` others; None: never."""
    add = folder.add

    def add_or_stop(prediction: Prediction) -> None:
        if len(folder.predictions) == count:
            raise KeyboardInterrupt
        add(prediction)

    folder.add = add_or_stop  # type: ignore[method-assign]
