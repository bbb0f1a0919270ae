"""A decoder of language models, one token at a time: rotary embeddings, grouped attention, SwiGLU.

Keys and values of earlier tokens are inputs of fixed length, those of the new token are outputs: nothing that
is as large as a cache is written in a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder.

    Attributes:
        width: of the stream between blocks.
        layers: blocks.
        heads: of queries.
        shared: heads of queries that read the same keys and values.
        hidden: of the gated layers.
        words: in the vocabulary.
        length: of the caches.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    shared: int = 3
    hidden: int = 2048
    words: int = 32000
    length: int = 256

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def key_heads(self) -> int:
        """Heads of keys and values."""
        return self.heads // self.shared


class Attention(nn.Module):
    """Grouped attention of one token to a cache and to itself."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        inner = shape.key_heads * shape.head
        self.query = nn.Linear(shape.width, shape.width, bias=False)
        self.key, self.value = (nn.Linear(shape.width, inner, bias=False) for _ in range(2))
        self.out = nn.Linear(shape.width, shape.width, bias=False)

    def forward(
        self, x: Tensor, turn: tuple[Tensor, Tensor], unseen: Tensor, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, width); turn: cosines and sines (1, head); keys, values (batch, key heads, length, head).

        Returns:
            (batch, width), and the token's own key and value, (batch, key heads, 1, head).
        """
        query = turned(self.query(x).unflatten(-1, (self.shape.key_heads, self.shape.shared, -1)), turn)
        key = turned(self.key(x).unflatten(-1, (self.shape.key_heads, 1, -1)), turn)
        value = self.value(x).unflatten(-1, (self.shape.key_heads, 1, -1))
        query = query * self.shape.head**-0.5
        before = (query @ keys.transpose(-1, -2)).masked_fill(unseen, float("-inf"))
        weights = torch.softmax(torch.cat((before, (query * key).sum(-1, keepdim=True)), -1), -1)
        mixed = weights[..., :-1] @ values + weights[..., -1:] * value
        return self.out(mixed.flatten(1)), key, value


def turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """Pairs of elements, half a head apart, turned by the position's angles."""
    first, second = x.chunk(2, -1)
    return x * turn[0] + torch.cat((-second, first), -1) * turn[1]


class Block(nn.Module):
    """Attention, then a gated pair of layers, each behind a normalisation and beside a sum."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.first, self.second = (nn.RMSNorm(shape.width, eps=1e-5) for _ in range(2))
        self.attention = Attention(shape)
        self.gate, self.up = (nn.Linear(shape.width, shape.hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        """x (batch, width); the rest as attention has it."""
        mixed, key, value = self.attention(self.first(x), *rest)
        x = x + mixed
        inner = self.second(x)
        return x + self.down(functional.silu(self.gate(inner)) * self.up(inner)), key, value


class Llama(nn.Module):
    """The whole decoder."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.words = nn.Embedding(shape.words, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-5)
        self.head = nn.Linear(shape.width, shape.words, bias=False)
        rates = 10000.0 ** (-torch.arange(0, shape.head, 2) / shape.head)
        angles = torch.outer(torch.arange(shape.length), rates).repeat(1, 2)
        self.register_buffer("cosines", angles.cos())
        self.register_buffer("sines", angles.sin())

    def forward(
        self, tokens: Tensor, position: Tensor, keys: tuple[Tensor, ...], values: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One token of every sequence.

        Args:
            tokens: (batch, 1) int64.
            position: (1,) int64, of the token.
            keys, values: a cache for every block, (batch, key heads, length, head); what lies at the position
                or behind it has no influence.

        Returns:
            Logits (batch, words), and what belongs into the caches at the position, keys and values
            (batch, layers, key heads, head).
        """
        x, turn = self.words(tokens)[:, 0], (self.cosines[position], self.sines[position])
        unseen = torch.arange(self.shape.length, device=tokens.device) >= position
        written = []
        for block, *cache in zip(self.blocks, keys, values, strict=True):
            x, *new = block(x, turn, unseen, *cache)
            written.append(new)
        rows = [torch.cat(one, 2).transpose(1, 2) for one in zip(*written, strict=True)]
        return self.head(self.norm(x)), rows[0], rows[1]


class Caches:
    """Keys and values of one sequence, all zeros at first.

    Args:
        shape: of the decoder.
        dtype: of the floats.
    """

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32) -> None:
        size = 1, shape.layers, shape.key_heads, shape.length, shape.head
        self._whole = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
        self.keys, self.values = (one.unbind(1) for one in self._whole)

    def write(self, position: int, *rows: Tensor) -> None:
        """Put keys and values (1, layers, key heads, head) at a position."""
        for whole, new in zip(self._whole, rows, strict=True):
            whole[:, :, :, position] = new


@torch.no_grad()
def decode(
    run: Callable[..., Any], shape: Shape, count: int, first: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[list[int], list[tuple[Any, ...]]]:
    """Decode greedily from one token on.

    Returns:
        The tokens, and the arguments of all calls, whose caches are those of the end.
    """
    caches, tokens, calls = Caches(shape, dtype), [first], []
    for position in range(count):
        calls.append((torch.tensor([tokens[-1:]]), torch.tensor([position]), caches.keys, caches.values))
        logits, *rows = run(*calls[-1])
        caches.write(position, *rows)
        tokens.append(int(logits.argmax()))
    return tokens[1:], calls
