"""A checkpoint format that knows layers by patterns only, as a stranger would write it in a package of its own.

config.json names a type for every module that a pattern matches. int4 weights are packed into int32, eight along the
input features in offset binary, under the name `weight_packed`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, Self

from quant_core import (
    CheckpointFolder,
    Detection,
    Evidence,
    Finding,
    LayerQuant,
    LayerQuery,
    Packing,
    QuantFormat,
    StoredForm,
    WeightForm,
)


class PatternFormat(QuantFormat):
    name = "patterns"
    vllm_name = "patterns"

    @classmethod
    def detect(cls, folder: CheckpointFolder) -> Detection | None:
        found = folder.declared_method == cls.vllm_name
        return Detection(cls.name, "config.json declares the method") if found else None

    @classmethod
    def load(cls, folder: CheckpointFolder) -> Self:
        return cls(folder)

    @property
    def section(self) -> dict[str, Any]:
        return dict(self.folder.config["quantization_config"])

    def canonical_suffixes(self, form: StoredForm) -> Mapping[str, str | None]:
        return {"weight_packed": "weight", "weight_shape": None}

    def layer_quant(self, query: LayerQuery) -> LayerQuant:
        modules = query.modules or (query.name,)
        for pattern, quant_type in self.section["targets"].items():
            if all(re.fullmatch(pattern, module) for module in modules):
                return self._stated(modules, quant_type, pattern)
        return LayerQuant(None, modules, reason="no pattern matches")

    def _stated(self, modules: tuple[str, ...], quant_type: str, pattern: str) -> LayerQuant:
        weight = WeightForm(
            num_bits=self.section["num_bits"],
            strategy="group",
            group_size=self.section["group_size"],
            packing=Packing(axis=1, values=8, signed=False) if self.section["num_bits"] == 4 else None,
        )
        stored = tuple(StoredForm(f.module, f.tensors, weight) for f in self.stored_forms(modules))
        return LayerQuant(quant_type, modules, stored, (Evidence("config.json", pattern, quant_type),))

    def review(self, decisions: Mapping[str, LayerQuant]) -> Iterable[Finding]:
        modules = [module for quant in decisions.values() for module in quant.modules]
        for pattern in self.section["targets"]:
            if not any(re.fullmatch(pattern, module) for module in modules):
                yield Finding(f"the pattern {pattern!r} matches no layer of the model", severity="warning")
