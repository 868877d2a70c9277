"""CPU kernels of the NPU operators, by family. The shared statement of what they compute is docs/operators.md."""
