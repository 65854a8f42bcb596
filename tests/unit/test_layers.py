"""The layers that several papers share: their quick ways give what their plain ways give."""

from __future__ import annotations

import pytest
import torch

from genlab.nn.flops import flop_counter
from genlab.nn.layers import GatedMLP, Linear, fusible


@pytest.mark.parametrize("rows", [1, 3, 127, 128, 300])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_without_gradients_is_linear(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = Linear(24, 40, bias=bias), torch.randn(rows, 24)
    with torch.no_grad():
        assert fusible(x, layer.weight) == (rows >= 128)
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("act", ["silu", "gelu"])
@pytest.mark.parametrize("shape", [(2, 3, 24), (4, 1, 64, 24)])
def test_gated_mlp_and_its_count_of_flops_are_the_same_with_and_without_gradients(act: str, shape: tuple) -> None:
    torch.manual_seed(0)
    mlp, x = GatedMLP(24, 40, act=act).eval(), torch.randn(shape)
    with flop_counter() as plain:
        expected = mlp(x)
    with torch.no_grad(), flop_counter() as quick:
        torch.testing.assert_close(mlp(x), expected)
    assert plain.get_total_flops() == quick.get_total_flops() == 2 * x.numel() * 40 * 3


def test_what_is_not_float32_or_is_autocast_takes_the_plain_way() -> None:
    x = torch.randn(200, 24)
    mlp = GatedMLP(24, 40).eval()
    with torch.no_grad():
        assert fusible(x, mlp.fc1_g.weight)
        assert not fusible(x.double(), mlp.fc1_g.weight)
        with torch.autocast("cpu", torch.bfloat16):
            assert not fusible(x, mlp.fc1_g.weight)
            assert mlp(x).dtype == torch.bfloat16
        assert mlp.double()(x.double()).dtype == torch.float64
