"""vLLM's quantisation methods, each holding a scheme of quant-core."""
