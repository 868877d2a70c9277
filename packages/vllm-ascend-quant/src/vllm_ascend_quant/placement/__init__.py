"""Where the tensors of a checkpoint belong in a model that vLLM built."""
