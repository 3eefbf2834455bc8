"""The default model without the layers between: real weights and tokenizer, words without sense, loaded in a second."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import openvino as ov

FIRST = LAST = 3  # layers; only first ones give the same word over and over


def shallow_model(source: Path, folder: Path) -> None:
    """Write the model folder `source`, converted from a GGUF, with its first and last layers into `folder`."""
    shutil.copytree(source, folder)
    _cut_json(folder / "config.json", "num_hidden_layers")
    _cut_json(folder / "ov_kvcrush.json", "num_layers")
    model = ov.Core().read_model(source / "openvino_model.xml")
    ends = {}
    for node in model.get_ops():
        name, _, layer = node.get_friendly_name().partition("add1.layer")
        if name == "model.layers.self_attn.":
            ends[int(layer)] = node.output(0)
    count = len(ends)
    for reader in list(ends[count - LAST - 1].get_target_inputs()):
        reader.replace_source_output(ends[FIRST - 1])
    layers = [*range(FIRST), *range(count - LAST, count)]
    kept = {f"past_key_values.{i}.{part}present.{i}.key" for i in layers for part in ("key", "value")}
    for sink in model.get_sinks():
        if sink.get_variable_id() not in kept:
            model.remove_sink(sink)
    for variable in model.get_variables():
        if variable.info.variable_id not in kept:
            model.remove_variable(variable)
    (folder / "openvino_model.bin").unlink()
    ov.save_model(model, folder / "openvino_model.xml", compress_to_fp16=False)


def _cut_json(path: Path, count: str) -> None:
    found = json.loads(path.read_text("utf-8"))
    found[count] = FIRST + LAST
    if "sliding_windows" in found:
        found["sliding_windows"] = found["sliding_windows"][: FIRST + LAST]
    path.write_text(json.dumps(found), "utf-8")
