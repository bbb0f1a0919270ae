"""Attention with dropout becomes a module; transformer blocks capture in both modes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qcompile.passes.attention import ScaledDotProductAttention
from qcompile.passes.capture import capture

torch.set_num_threads(1)


class SelfAttention(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            self.qkv(x).reshape(batch, length, 3, 2, width // 2).permute(2, 0, 3, 1, 4).unbind(0)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, width))


@pytest.mark.parametrize("with_examples", [True, False])
def test_attention_with_dropout_obeys_eval(with_examples: bool) -> None:
    model = SelfAttention(0.3).train()
    x = torch.randn(3, 5, 8)
    graph_module = capture(model, x if with_examples else None).graph_module
    attention = graph_module.attention
    assert isinstance(attention, ScaledDotProductAttention)
    assert (attention.dropout_p, attention.is_causal) == (0.3, True)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(graph_module(x)[0], expected)
    torch.testing.assert_close(graph_module.eval()(x)[0], model.eval()(x), rtol=0, atol=0)


def test_attention_without_dropout_stays_a_function() -> None:
    graph_module = capture(SelfAttention(0.0), torch.randn(2, 5, 8)).graph_module
    assert not hasattr(graph_module, "attention")


@pytest.mark.parametrize("frozen", [True, False])
def test_transformer_encoder(frozen: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).requires_grad_(not frozen)
    captured = capture(model, torch.randn(2, 5, 8))
    called = {str(node.target) for node in captured.graph_module.graph.nodes if node.op == "call_module"}
    assert {"layers.0.linear1", "layers.1.linear2", "layers.0.norm1", "layers.0.dropout1"} <= called
    assert list(captured.graph_module.state_dict()) == list(model.state_dict())
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(captured.graph_module.eval()(x)[0], model.eval()(x))
