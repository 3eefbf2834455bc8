"""What tests that run openvino_genai and this package on the same input share."""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as stock

import ov_kvcrush as ours

PROMPT = ov.Tensor(np.arange(40, 60)[None])
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
BOTH = (stock, ours)
Pipes = dict[Any, Any]  # by module
