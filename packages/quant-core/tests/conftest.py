"""What several test modules need: they cannot import each other, so it comes as fixtures."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from quant_core import AscendLinearScheme, LayerContext, Partition, Shard, StoredForm, StoredTensor
from quant_core.ops.cpu import int8_gemm
from quant_core.schemes.handover import hand_over
from quant_core.schemes.params import layouts_of, replace_parameter
from quant_core.schemes.verify import absent_params, linear_params

# No deadline: the first example of a test pays for imports and for the threads of torch.
settings.register_profile("quick", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("fuzz", settings.get_profile("quick"), max_examples=5000)  # --hypothesis-profile=fuzz
settings.load_profile("quick")

# The tensors here are tiny: on a busy machine, waiting for a second thread takes many times as long as the work.
torch.set_num_threads(1)

#: One checkpoint module: its stored tensors by suffix.
Stored = Mapping[str, Tensor]

RIGHT_CANDIDATES = [c for c in int8_gemm.CANDIDATES if int8_gemm.refusal(c) is None]


class Workbench:
    """Allocates, cuts and fuses what a scheme declares, as an engine does, and lets the scheme process it."""

    def context(
        self,
        members: Sequence[Stored],
        dtype: torch.dtype = torch.float32,
        partition: Partition | None = None,
        **options: Any,
    ) -> LayerContext:
        """The context of a layer that is fused from stored modules."""
        partition = partition or Partition()
        parts = partition.size if partition.kind == "column" else 1
        sizes = [member["weight"].shape[0] for member in members]
        return LayerContext(
            name="layers.0.proj",
            layer_type="linear",
            shards=tuple(Shard(f"m{i}", size, size // parts) for i, size in enumerate(sizes)),
            input_size=members[0]["weight"].shape[1],
            params_dtype=dtype,
            stored=tuple(self.form(f"m{i}", member) for i, member in enumerate(members)),
            partition=partition,
            **options,
        )

    def form(self, module: str, member: Stored) -> StoredForm:
        """What the header of a file with these tensors says."""
        return StoredForm(
            module,
            {s: StoredTensor(f"{module}.{s}", tuple(t.shape), t.dtype, "model.safetensors") for s, t in member.items()},
        )

    def load(self, scheme: AscendLinearScheme, members: Sequence[Stored]) -> nn.Module:
        """A layer that holds this rank's part of the stored tensors, every element of it written exactly once."""
        layer, partition = nn.Module(), scheme.context.partition
        layouts = layouts_of(linear_params(scheme), scheme.context)
        for name, layout in layouts.items():
            value, written = torch.zeros(layout.shape, dtype=layout.param.dtype), torch.zeros(layout.shape)
            for index, (member, param) in enumerate(zip(members, layout.members, strict=True)):
                part = member[name]
                assert tuple(part.shape) == param.shape, f"{name} is declared otherwise"
                assert param.takes(part.dtype), f"{name} is declared otherwise"
                where: list[Any] = [slice(None)] * value.dim()
                where[layout.axis or 0] = index if layout.axis is None else layout.member(index)
                if param.output_dim is not None and partition.kind == "column":
                    part = part.chunk(partition.size, param.output_dim)[partition.rank]
                if param.input_dim is not None and partition.kind == "row":
                    part = part.chunk(partition.size, param.input_dim)[partition.rank]
                value[tuple(where)] = part
                written[tuple(where)] += 1
            assert bool((written == 1).all()), f"{name}: the members do not fill it"
            replace_parameter(layer, name, value)
        hand_over(layer, layouts.values(), layouts_of(absent_params(scheme), scheme.context).values())
        return layer

    def serve(
        self, scheme_class: type[AscendLinearScheme], members: Sequence[Stored], **options: Any
    ) -> tuple[AscendLinearScheme, nn.Module]:
        """A scheme and its processed layer; options are those of `context`."""
        scheme = scheme_class.create(self.context(members, **options))
        layer = self.load(scheme, members)
        scheme.process_weights_after_loading(layer)
        return scheme, layer

    def run_ranks(
        self,
        scheme_class: type[AscendLinearScheme],
        members: Sequence[Stored],
        x: Tensor,
        kind: str,
        size: int,
        **options: Any,
    ) -> Tensor:
        """The layer's output over all ranks: members side by side (column), or the sum (row)."""
        outputs = []
        for rank in range(size):
            scheme, layer = self.serve(scheme_class, members, partition=Partition(kind, rank, size), **options)
            part = x.chunk(size, -1)[rank] if kind == "row" else x
            local = [shard.local_output_size for shard in scheme.context.shards]
            outputs.append(scheme.apply(layer, part, tp_rank=rank).split(local, -1))
        fused = [torch.cat(member, -1) if kind == "column" else sum(member) for member in zip(*outputs, strict=True)]
        return torch.cat(fused, -1)


@pytest.fixture(scope="session")
def workbench() -> Workbench:
    """Everything between stored tensors and a layer that can be applied."""
    return Workbench()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Tests draw the same numbers whichever of them run."""
    torch.manual_seed(20240229)


@pytest.fixture(autouse=True)
def forced_gemm(monkeypatch: pytest.MonkeyPatch) -> None:
    """QUANT_CORE_TEST_GEMM=float32_chunks runs all tests with that candidate."""
    name = os.environ.get("QUANT_CORE_TEST_GEMM")
    if name:
        monkeypatch.setattr(int8_gemm, "choose", lambda: getattr(int8_gemm, name))


@pytest.fixture(params=RIGHT_CANDIDATES, ids=lambda candidate: candidate.__name__)
def each_gemm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, forced_gemm: None) -> None:
    """Runs a test with every int8 product that is right on this processor, whichever would be chosen."""
    monkeypatch.setattr(int8_gemm, "choose", lambda: request.param)


@pytest.fixture
def compile_afresh() -> Iterator[Callable[..., Any]]:
    """torch.compile without graph breaks and without what other tests compiled."""
    torch.compiler.reset()
    yield lambda function, **options: torch.compile(function, fullgraph=True, **options)
    torch.compiler.reset()


@pytest.fixture(scope="session")
def run_python() -> Callable[..., str]:
    """Runs code in a process of its own, with packages from these paths; its output and warnings."""

    def run(code: str, *paths: Path) -> str:
        path = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "PYTHONPATH": path}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    return run
