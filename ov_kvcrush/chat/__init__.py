"""ov_kvcrush-chat: conversations in a terminal."""
