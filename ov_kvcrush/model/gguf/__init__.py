"""GGUF files to OpenVINO models."""
