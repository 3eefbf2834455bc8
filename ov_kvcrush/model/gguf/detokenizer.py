"""Tokens of a GGUF's own (`<tool_call>`, `<think>`) stay in decoded answers.

openvino_genai's converter has its detokenizer leave out tokens of type USER_DEFINED as it leaves out CONTROL tokens;
llama.cpp shows them, and so do the tokenizers of the models that they come from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ov_kvcrush.errors import ModelError
from ov_kvcrush.model.gguf.reader import GgufHeader

XML = "openvino_detokenizer.xml"
USER_DEFINED = 4  # of tokenizer.ggml.token_type


def show_user_defined_tokens(header: GgufHeader, folder: Path) -> int:
    """Take USER_DEFINED tokens from those that the detokenizer in `folder` leaves out; return how many were.

    Raises ModelError if the detokenizer is not built as openvino_genai 2026.4 builds it.
    """
    kinds = np.array(header.metadata["tokenizer.ggml.token_type"])
    if not (kinds == USER_DEFINED).any():
        return 0
    import openvino as ov
    import openvino_tokenizers  # type: ignore[import-untyped]

    core = ov.Core()
    core.set_property({"ENABLE_MMAP": False})  # the file that constants would be mapped from is replaced below
    core.add_extension(str(openvino_tokenizers._ext_path))
    model = core.read_model(folder / XML)
    left_out = [node.input_value(4) for node in model.get_ordered_ops() if node.get_type_name() == "VocabDecoder"]
    skipped = left_out[0].get_node().input_value(0).get_node() if left_out else None
    if skipped is None or skipped.get_type_name() != "Constant":
        raise ModelError(f"{folder / XML} must have a list of the tokens it leaves out, got none")
    ids = skipped.data
    kept = ids[kinds[ids] != USER_DEFINED]
    if len(kept) == len(ids):
        return 0
    slice_input = left_out[0].get_node().input(0)
    slice_input.replace_source_output(ov.op.Constant(kept).output(0))
    model.validate_nodes_and_infer_types()
    ov.save_model(model, folder / f"shown_{XML}", compress_to_fp16=False)
    del model
    for end in (".bin", ".xml"):
        (folder / f"shown_openvino_detokenizer{end}").replace(folder / f"openvino_detokenizer{end}")
    return len(ids) - len(kept)
