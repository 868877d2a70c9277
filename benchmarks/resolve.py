"""Resolving every layer of a description as large as DeepSeek-V3's, and the steps before it."""

import gc
import tempfile
from pathlib import Path

import deepseek
from measure import alternating, arguments, report

from quant_core import DOWN, GATE_UP, CheckpointFolder, ExpertSizes, LayerQuant, LayerQuery, QuantFormat
from quant_core.checkpoint import PlannedFolder
from quant_modelslim.format import ModelSlimFormat

PACKED = {"gate_up_proj": ["gate_proj", "up_proj"], "fused_qkv_a_proj": ["q_a_proj", "kv_a_proj_with_mqa"]}


def queries() -> list[LayerQuery]:
    """What an engine asks: its own layers, fused as it fuses them; the experts of a layer are one question."""
    asked = ["model.embed_tokens", "lm_head"]
    experts = []
    for layer in range(deepseek.LAYERS):
        prefix = f"model.layers.{layer}"
        asked += [f"{prefix}.self_attn.{n}" for n in ("fused_qkv_a_proj", "q_b_proj", "kv_b_proj", "o_proj")]
        if layer < deepseek.DENSE_LAYERS:
            asked += [f"{prefix}.mlp.{n}" for n in ("gate_up_proj", "down_proj")]
            continue
        asked += [f"{prefix}.mlp.{n}" for n in ("gate", "shared_experts.gate_up_proj", "shared_experts.down_proj")]
        halves = {
            half: tuple(tuple(f"{prefix}.mlp.experts.{e}.{name}" for name in names) for e in range(deepseek.EXPERTS))
            for half, names in ((GATE_UP, ("gate_proj", "up_proj")), (DOWN, ("down_proj",)))
        }
        sizes = ExpertSizes(deepseek.HIDDEN, deepseek.EXPERT, deepseek.EXPERTS)
        experts.append(LayerQuery(f"{prefix}.mlp.experts", "moe", experts=halves, sizes=sizes))
    return [*(LayerQuery(name, packed_modules=PACKED) for name in asked), *experts]


def answer(found: QuantFormat, query: LayerQuery) -> LayerQuant:
    """What the format says of a layer."""
    return found.experts_quant(query) if query.layer_type == "moe" else found.layer_quant(query)


def main() -> None:
    """Print milliseconds of each step."""
    options = arguments(__doc__).parse_args()
    asked = queries()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        keys = deepseek.write(path)

        def from_description() -> None:
            found = ModelSlimFormat.load(PlannedFolder(path))
            for query in asked:
                answer(found, query)

        loaded = ModelSlimFormat.load(CheckpointFolder(path))

        def from_files() -> None:
            found = ModelSlimFormat.load(CheckpointFolder(path))
            for query in asked:
                answer(found, query)

        runs = {
            "description: read, check, resolve": from_description,
            "of which JSON": lambda: PlannedFolder(path).read_json("quant_model_description.json"),
            "of which resolve": lambda: [answer(loaded, query) for query in asked],
            "experts: resolve, create and compare with the files": lambda: [
                loaded.create_scheme_for_layer(query) for query in asked if query.layer_type == "moe"
            ],
            "headers of all files": lambda: CheckpointFolder(path).tensors,
            "description and headers compared": from_files,
        }
        gc.collect()
        best = alternating(runs, options.seconds)
    title = f"{keys:,} keys, {len(asked)} layers (the experts of a layer are one), milliseconds"
    report("resolve", title, ["", "ms"], [[step, seconds * 1e3] for step, seconds in best.items()])


if __name__ == "__main__":
    main()
