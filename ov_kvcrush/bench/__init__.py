"""The benchmark: this engine, and openvino_genai beside it, under equal settings."""
