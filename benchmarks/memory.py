"""The memory of DeepSeek-V3's weights on each of 16 NPUs: the table of docs/scale.md. Nothing is measured."""

import math
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import deepseek
from resolve import queries

from quant_core import CheckpointFolder, ExpertSizes, LayerQuery, LinearSizes, Partition, QuantFormat
from quant_core.memory import stored_bytes
from quant_modelslim.format import ModelSlimFormat

#: How vLLM's model cuts its layers, by the last component of their names; norms and routers are on every rank.
COLUMN = {"q_b_proj", "kv_b_proj", "gate_up_proj", "embed_tokens", "lm_head"}
ROW = {"o_proj", "down_proj"}
LATENT = 512 + 64  # what MLA keeps of a token in each layer, on every rank of tensor parallelism


@dataclass(frozen=True)
class Plan:
    """How 16 NPUs are used. `experts` is over how many of them whole experts are spread; 1 cuts each expert."""

    name: str
    tensor: int
    pipeline: int = 1
    experts: int = 1


PLANS = (
    Plan("TP 16", 16),
    Plan("TP 16, EP 16", 16, experts=16),
    Plan("DP 16, EP 16", 1, experts=16),
    Plan("TP 8, PP 2", 8, pipeline=2),
    Plan("TP 8, PP 2, EP 8", 8, pipeline=2, experts=8),
)


def stage(name: str, pipeline: int) -> int:
    """Which rank of the pipeline has a layer: vLLM gives the layer that is left over to the last but one."""
    parts = name.split(".")
    if "layers" not in parts:
        return 0 if "embed_tokens" in parts else pipeline - 1
    return min(int(parts[2]) // math.ceil(deepseek.LAYERS / pipeline), pipeline - 1)


def partition(name: str, size: int) -> Partition:
    """How a layer is cut."""
    last = name.rpartition(".")[2]
    return Partition("column" if last in COLUMN else "row" if last in ROW else "replicated", size=size)


def layer_bytes(found: QuantFormat, query: LayerQuery, plan: Plan) -> int:
    """The bytes of one layer on a rank that has it."""
    if isinstance(query.sizes, ExpertSizes):
        cut = Partition(size=plan.tensor if plan.experts == 1 else 1)
        local = tuple(range(query.sizes.num_experts // plan.experts))
        asked = replace(query, partition=cut, sizes=replace(query.sizes, local_experts=local))
        scheme = found.create_scheme_for_layer(asked)
        assert scheme is not None
        return stored_bytes(scheme)
    cut = partition(query.name, plan.tensor)
    quant = found.layer_quant(query)
    stored = found.stored_forms(quant.modules)
    if quant.quant_type is None:
        whole = sum(tensor_bytes(tensor) for form in stored for tensor in form.tensors.values())
        return whole // (1 if cut.kind == "replicated" else cut.size)
    sizes = [form.shape("weight", ()) for form in stored]  # int8, so not packed
    inputs, outputs = sizes[0][1], tuple(size[0] for size in sizes)
    local = tuple(size // cut.size for size in outputs) if cut.kind == "column" else outputs
    scheme = found.create_scheme_for_layer(replace(query, partition=cut, sizes=LinearSizes(inputs, outputs, local)))
    assert scheme is not None
    return stored_bytes(scheme)


def tensor_bytes(tensor: object) -> int:
    """The bytes of a tensor of the files."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize  # type: ignore[attr-defined]


def rank_bytes(found: QuantFormat, plan: Plan) -> list[tuple[int, int]]:
    """Bytes of the experts and of all the rest on a rank of each stage of the pipeline."""
    sums = [[0, 0] for _ in range(plan.pipeline)]
    asked = queries()
    for query in asked:
        sums[stage(query.name, plan.pipeline)][query.layer_type != "moe"] += layer_bytes(found, query, plan)
    linear = [query for query in asked if query.layer_type == "linear"]
    claimed = {module for query in linear for module in found.layer_quant(query).modules}
    for module, form in found.modules.items():  # norms and what lies beside routers
        if module not in claimed and ".experts." not in module:
            sums[stage(module, plan.pipeline)][1] += sum(map(tensor_bytes, form.tensors.values()))
    return [(experts, rest) for experts, rest in sums]


def main() -> None:
    """Print the table."""
    print("| experts | ranks | experts, GB | all else, GB | sum, GB | cache per 1000 tokens, MB |")
    print("|---|---|---|---|---|---|")
    for quant_type in ("W8A8_DYNAMIC", "W4A8_DYNAMIC"):
        with tempfile.TemporaryDirectory() as name:
            deepseek.write(Path(name), experts=quant_type)
            found = ModelSlimFormat.load(CheckpointFolder(name))
            for plan in PLANS:
                for index, (experts, rest) in enumerate(rank_bytes(found, plan)):
                    layers = sum(stage(f"model.layers.{n}", plan.pipeline) == index for n in range(deepseek.LAYERS))
                    label = plan.name + (f", stage {index + 1} ({layers} layers)" if plan.pipeline > 1 else "")
                    numbers = [f"{value / 1e9:.1f}" for value in (experts, rest, experts + rest)]
                    print(f"| {quant_type} | {label} | {' | '.join(numbers)} | {layers * LATENT * 2 / 1e3:.0f} |")


if __name__ == "__main__":
    main()
