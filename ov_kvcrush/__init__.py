"""LLMs on OpenVINO with a KV cache that is scored, crushed, stored in mixed precision and reused.

The objects that openvino_genai hands out are used as they are and exported here for convenience.
"""

from openvino_genai import (
    ChatHistory,
    GenerationConfig,
    GenerationFinishReason,
    GenerationStatus,
    StreamerBase,
    StreamingStatus,
    TextStreamer,
    Tokenizer,
)

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.contexts.context import Context
from ov_kvcrush.core.end_reason import EndReason
from ov_kvcrush.core.outputs import (
    DecodedResults,
    EncodedGenerationResult,
    EncodedResults,
    GenerationOutput,
    GenerationResult,
    PerfMetrics,
    PipelineMetrics,
)
from ov_kvcrush.errors import (
    ContextFileError,
    CrushError,
    ExportError,
    ModelError,
    OutOfMemory,
    QueueFull,
    RequestError,
    RequestTimeout,
)
from ov_kvcrush.pipelines.continuous_batching import ContinuousBatchingPipeline
from ov_kvcrush.pipelines.llm import LLMPipeline

__version__ = "0.1.0"

__all__ = [
    "CacheConfig",
    "ChatHistory",
    "Context",
    "ContextFileError",
    "ContinuousBatchingPipeline",
    "CrushError",
    "DecodedResults",
    "EncodedGenerationResult",
    "EncodedResults",
    "EndReason",
    "ExportError",
    "GenerationConfig",
    "GenerationFinishReason",
    "GenerationOutput",
    "GenerationResult",
    "GenerationStatus",
    "LLMPipeline",
    "ModelError",
    "OutOfMemory",
    "PerfMetrics",
    "PipelineMetrics",
    "QueueFull",
    "RequestError",
    "RequestTimeout",
    "SchedulerConfig",
    "StreamerBase",
    "StreamingStatus",
    "TextStreamer",
    "Tokenizer",
    "__version__",
]
