"""ov_kvcrush-eval: commands and their options."""
