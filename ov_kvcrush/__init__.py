"""LLMs on OpenVINO with a KV cache that is scored, crushed, stored in mixed precision and reused.

The objects that openvino_genai hands out are used as they are and exported here for convenience.
"""

from openvino_genai import (
    AggregationMode,
    CacheEvictionConfig,
    ChatHistory,
    DeepSeekR1ReasoningIncrementalParser,
    DeepSeekR1ReasoningParser,
    GenerationConfig,
    GenerationFinishReason,
    GenerationStatus,
    IncrementalParser,
    KVCrushAnchorPointMode,
    KVCrushConfig,
    Llama3JsonToolParser,
    Llama3PythonicToolParser,
    Parser,
    Phi4ReasoningIncrementalParser,
    Phi4ReasoningParser,
    ReasoningIncrementalParser,
    ReasoningParser,
    SparseAttentionConfig,
    SparseAttentionMode,
    StopCriteria,
    StreamerBase,
    StreamingStatus,
    StructuralTagItem,
    StructuralTagsConfig,
    StructuredOutputConfig,
    TextParserStreamer,
    TextStreamer,
    TokenizedInputs,
    Tokenizer,
    VLLMParserWrapper,
    get_version,
)

from ov_kvcrush.config import CacheConfig, SchedulerConfig
from ov_kvcrush.contexts.context import Context
from ov_kvcrush.core.draft_metrics import SDPerfMetrics, SDPerModelsPerfMetrics
from ov_kvcrush.core.end_reason import EndReason
from ov_kvcrush.core.outputs import (
    DecodedResults,
    EncodedGenerationResult,
    EncodedResults,
    GenerationOutput,
    GenerationResult,
    PipelineMetrics,
)
from ov_kvcrush.core.perf_metrics import PerfMetrics, RawPerfMetrics
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
from ov_kvcrush.model.adapters import Adapter, AdapterConfig
from ov_kvcrush.pipelines.continuous_batching import ContinuousBatchingPipeline
from ov_kvcrush.pipelines.draft import draft_model
from ov_kvcrush.pipelines.llm import LLMPipeline

__version__ = "0.1.0"

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AggregationMode",
    "CacheConfig",
    "CacheEvictionConfig",
    "ChatHistory",
    "Context",
    "ContextFileError",
    "ContinuousBatchingPipeline",
    "CrushError",
    "DecodedResults",
    "DeepSeekR1ReasoningIncrementalParser",
    "DeepSeekR1ReasoningParser",
    "EncodedGenerationResult",
    "EncodedResults",
    "EndReason",
    "ExportError",
    "GenerationConfig",
    "GenerationFinishReason",
    "GenerationOutput",
    "GenerationResult",
    "GenerationStatus",
    "IncrementalParser",
    "KVCrushAnchorPointMode",
    "KVCrushConfig",
    "LLMPipeline",
    "Llama3JsonToolParser",
    "Llama3PythonicToolParser",
    "ModelError",
    "OutOfMemory",
    "Parser",
    "PerfMetrics",
    "Phi4ReasoningIncrementalParser",
    "Phi4ReasoningParser",
    "PipelineMetrics",
    "QueueFull",
    "RawPerfMetrics",
    "ReasoningIncrementalParser",
    "ReasoningParser",
    "RequestError",
    "RequestTimeout",
    "SDPerModelsPerfMetrics",
    "SDPerfMetrics",
    "SchedulerConfig",
    "SparseAttentionConfig",
    "SparseAttentionMode",
    "StopCriteria",
    "StreamerBase",
    "StreamingStatus",
    "StructuralTagItem",
    "StructuralTagsConfig",
    "StructuredOutputConfig",
    "TextParserStreamer",
    "TextStreamer",
    "TokenizedInputs",
    "Tokenizer",
    "VLLMParserWrapper",
    "__version__",
    "draft_model",
    "get_version",
]
