"""The `ov_kvcrush-chat` command."""
