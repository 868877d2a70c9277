"""All operators of an expert layer in a row, as a scheme calls them, against one token at a time in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

npu = torch.ops.npu

E, K, H, WIDTH = 6, 3, 32, 16


class Layer:
    """int8 experts of which a rank holds some, dynamically quantised."""

    def __init__(self, here: tuple[int, int] = (0, E)) -> None:
        generator = torch.Generator().manual_seed(7)  # the same on every rank
        w13 = torch.randint(-128, 128, (E, 2 * WIDTH, H), dtype=torch.int8, generator=generator)
        w2 = torch.randint(-128, 128, (E, H, WIDTH), dtype=torch.int8, generator=generator)
        s13, s2 = torch.rand(E, 2 * WIDTH, generator=generator) / 100, torch.rand(E, H, generator=generator) / 100
        self.here, part = here, slice(*here)
        self.all = (w13.double() * s13.double()[..., None], w2.double() * s2.double()[..., None])
        self.w13, self.w2 = w13[part].transpose(1, 2), w2[part].transpose(1, 2)
        self.s13, self.s2 = s13[part], s2[part]

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Route in, multiply, activate, multiply, route out."""
        codes, places, counts, scale = npu.npu_moe_init_routing_v2(
            x,
            ids,
            expert_num=E,
            expert_tokens_num_type=1,
            expert_tokens_num_flag=True,
            quant_mode=1,
            active_expert_range=list(self.here),
        )
        groups = {"split_item": 2, "group_type": 0, "group_list_type": 1, "group_list": counts}
        (sums,) = npu.npu_grouped_matmul([codes], [self.w13], **groups, output_dtype=torch.int32)
        codes, scale = npu.npu_dequant_swiglu_quant(
            sums,
            weight_scale=self.s13,
            activation_scale=scale,
            group_index=counts,
            activate_left=True,
            quant_mode=1,
        )
        (y,) = npu.npu_grouped_matmul(
            [codes], [self.w2], scale=[self.s2], per_token_scale=[scale], **groups, output_dtype=x.dtype
        )
        result: Tensor = npu.npu_moe_token_unpermute(y, places, weights)
        return result

    def exact(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """The same of float activations, token by token, in float64."""
        (w13, w2), (first, last) = self.all, self.here
        result = torch.zeros(x.shape, dtype=torch.float64)
        for token, experts in enumerate(ids.tolist()):
            for choice, expert in enumerate(experts):
                if first <= expert < last:
                    left, right = (w13[expert] @ x[token].double()).chunk(2)
                    value = w2[expert] @ (left / (1 + (-left).exp()) * right)
                    result[token] += weights[token, choice].double() * value
        return result


def inputs(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their weights, and the experts that they chose."""
    ids = torch.rand(tokens, E).topk(K).indices.to(torch.int32)
    return torch.randn(tokens, H), torch.rand(tokens, K), ids


def close(got: Tensor, exact: Tensor) -> bool:
    """Up to the quantisation of activations, twice."""
    return bool((got.double() - exact).norm() <= 0.02 * exact.norm() + 1e-9)


@pytest.mark.parametrize("tokens", [0, 1, 5, 100])
def test_an_expert_layer(tokens: int) -> None:
    layer, given = Layer(), inputs(tokens)
    got = layer(*given)
    assert got.shape == (tokens, H)
    assert close(got, layer.exact(*given))


@pytest.mark.parametrize("case", ["all on one", "ids of -1", "nobody"])
def test_unusual_choices(case: str) -> None:
    layer = Layer()
    x, weights, ids = inputs(40)
    ids = {"all on one": torch.full_like(ids, 4), "ids of -1": ids.clone(), "nobody": torch.full_like(ids, -1)}[case]
    if case == "ids of -1":
        ids[::3, 1] = -1
        x[0], ids[0] = float("nan"), -1
    got = layer(x, weights, ids)
    if case == "ids of -1":
        x[0] = 0
    exact = layer.exact(x, weights, ids)
    assert close(got, exact)
    assert got.any().item() == (case != "nobody")


def test_ranks_add_up() -> None:
    """Of six experts two, one and three: a sum of what ranks compute is what one computes."""
    given = inputs(50)
    whole = Layer()(*given)
    parts = [Layer(here)(*given) for here in ((0, 2), (2, 3), (3, 6))]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)
    assert all(not torch.equal(part, whole) for part in parts)


def test_the_number_of_tokens_stays_open_when_it_is_compiled(compile_afresh: Callable[..., Any]) -> None:
    layer, compilations = Layer(), []

    def backend(graph: Any, examples: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    compiled = compile_afresh(layer.__call__, backend=backend, dynamic=True)
    for tokens in (5, 2, 100):
        given = inputs(tokens)
        assert torch.equal(compiled(*given), layer(*given))
    assert len(compilations) == 1
