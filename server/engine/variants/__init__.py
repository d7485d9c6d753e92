"""The vLLM twin of each kind of variant, one file a kind."""
