"""Budget allocators: how many tokens each layer and KV head keeps."""
