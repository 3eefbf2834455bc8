"""Export of Hugging Face folders, hub models and GGUF files to OpenVINO model folders with `ov_kvcrush.json`."""

from model_export.export import export_model
from model_export.options import WeightOptions

__all__ = ["WeightOptions", "export_model"]
