"""engine="genai": the same backend over openvino_genai."""
