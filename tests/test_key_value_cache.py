"""Token by token: a GPT-like model that writes its keys and values into a cache of fixed length."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from amx import FLAGS
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.model import QuantModel

torch.set_num_threads(1)

LENGTH, WORDS, WIDTH, HEADS, LAYERS, STEPS = 8, 23, 32, 4, 2, 6
Cache = tuple[tuple[Tensor, Tensor], ...]


def by_index_copy(cache: Tensor, position: Tensor, new: Tensor) -> Tensor:
    return cache.index_copy(2, position, new)


def by_assignment(cache: Tensor, position: Tensor, new: Tensor) -> Tensor:
    cache = cache.clone()
    cache[:, :, position] = new
    return cache


def by_scatter(cache: Tensor, position: Tensor, new: Tensor) -> Tensor:
    return cache.scatter(2, position[:, None].expand_as(new), new)


#: Ways to write one row (batch, heads, 1, width) of a cache (batch, heads, length, width) at a position (1,).
WRITES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "index_copy": by_index_copy,
    "assignment": by_assignment,
    "scatter": by_scatter,
}


class Block(nn.Module):
    def __init__(self, write: str) -> None:
        super().__init__()
        self.write = WRITES[write]
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, unseen: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Any:
        """x (batch, 1, width); unseen (length,) true where the cache holds nothing yet."""
        query, key, value = self.heads(x)
        keys, values = self.write(keys, position, key), self.write(values, position, value)
        x = x + self.attend(query, keys, values, unseen)
        return x + self.down(functional.gelu(self.up(self.second(x)))), (keys, values)

    def full(self, x: Tensor) -> Tensor:
        """x (batch, tokens, width), all tokens at once and without a cache."""
        unseen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        x = x + self.attend(*self.heads(x), unseen)
        return x + self.down(functional.gelu(self.up(self.second(x))))

    def heads(self, x: Tensor) -> list[Tensor]:
        split = [one.unflatten(-1, (HEADS, -1)) for one in self.qkv(self.first(x)).chunk(3, -1)]
        return [one.transpose(1, 2) for one in split]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, unseen: Tensor) -> Tensor:
        scores = query @ keys.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5
        mixed = torch.softmax(scores.masked_fill(unseen, float("-inf")), -1) @ values
        return self.out(mixed.transpose(1, 2).flatten(-2))


class Decoder(nn.Module):
    def __init__(self, write: str) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(write) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor, position: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """tokens (batch, 1) int64 at position (1,) int64; returns logits (batch, words) and the new cache."""
        x = self.words(tokens) + self.places(position)
        unseen = torch.arange(LENGTH, device=tokens.device) > position
        written = []
        for block, (keys, values) in zip(self.blocks, cache, strict=True):
            x, pair = block(x, unseen, position, keys, values)
            written.append(pair)
        return self.head(self.norm(x))[:, 0], tuple(written)

    def full(self, tokens: Tensor) -> Tensor:
        """tokens (batch, count) int64; logits (batch, count, words)."""
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block.full(x)
        return self.head(self.norm(x))


def empty(batch: int) -> Cache:
    shape = batch, HEADS, LENGTH, WIDTH // HEADS
    return tuple((torch.zeros(shape), torch.zeros(shape)) for _ in range(LAYERS))


def decode(run: Callable[..., Any], first: Tensor) -> tuple[Tensor, Tensor, list[tuple[Any, ...]]]:
    """Greedy decoding from first tokens (batch, 1): tokens (batch, steps), logits, and all calls' inputs."""
    tokens, cache, logits, calls = [first], empty(len(first)), [], []
    with torch.no_grad():
        for step in range(STEPS):
            calls.append((tokens[-1], torch.tensor([step]), cache))
            found, cache = run(*calls[-1])
            logits.append(found)
            tokens.append(found.argmax(-1, keepdim=True))
    return torch.cat(tokens[:-1], 1), torch.stack(logits, 1), calls


def decoder(write: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder(write).eval()


FIRST = torch.tensor([[3], [11]])
MODES: dict[str, dict[str, Any]] = {"weights only": {"modes": ("w4", "w8")}, "all": {"bits": (2, 4)}}
CASES = [(kind, mode) for kind, modes in (("weights only", ("w4", "w8")), ("all", (2, 4))) for mode in modes]


@pytest.fixture(scope="module")
def prepared() -> dict[str, QuantModel]:
    """By kind of modes; captured with one sequence."""
    found = {}
    for (kind, modes), write in zip(MODES.items(), ("assignment", "index_copy"), strict=True):
        network = decoder(write)
        calls = decode(network, FIRST)[2]
        example = decode(network, FIRST[:1])[2][2]
        model = qcompile.prepare(network, example, **modes)
        qcompile.calibrate(model, [(*call, torch.zeros(2)) for call in calls])  # what follows is no input
        found[kind] = model.eval()
    return found


@pytest.mark.parametrize("write", WRITES)
def test_decoding_step_by_step_equals_all_tokens_at_once(write: str) -> None:
    network = decoder(write)
    tokens, logits, calls = decode(network, FIRST)
    with torch.no_grad():
        # the same products, summed in another order
        torch.testing.assert_close(network.full(tokens), logits, rtol=0, atol=1e-5)
    captured = qcompile.prepare(network, calls[0], modes=("w8",))
    assert [one.is_batched for one in captured.signature.inputs] == [True, False] + [True] * 2 * LAYERS
    assert all(torch.equal(one, zero) for one, zero in zip(*map(flat, (calls[0][2], empty(2))), strict=True))


def flat(cache: Cache) -> list[Tensor]:
    return [one for pair in cache for one in pair]


@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_modes_decode_and_are_exact(prepared: dict[str, QuantModel], kind: str, mode: int | str) -> None:
    model = prepared[kind]
    assert [one.is_batched for one in model.signature.inputs] == [True, False] + [True] * 2 * LAYERS
    tokens, _, calls = decode(qcompile.at(model, mode), FIRST)
    assert len({tuple(column) for column in tokens.T.tolist()}) > 1
    for call in (calls[0], calls[-1]):
        assert qcompile.verify(model, call, bits=mode).exact
    one_by_one = [decode(qcompile.at(model, mode), FIRST[i : i + 1])[0] for i in range(2)]
    assert torch.equal(torch.cat(one_by_one), tokens)


def test_eight_bits_decode_what_float_decodes(prepared: dict[str, QuantModel]) -> None:
    tokens, logits, calls = decode(decoder("assignment"), FIRST)
    with torch.no_grad():
        for mode, most in (("w4", 0.2), ("w8", 0.02)):
            found = torch.stack([qcompile.at(prepared["weights only"], mode)(*call)[0] for call in calls], 1)
            assert (found - logits).square().mean().sqrt() < most * logits.square().mean().sqrt()
    assert torch.equal(decode(qcompile.at(prepared["weights only"], "w8"), FIRST)[0], tokens)


@pytest.mark.parametrize("kind", MODES)
def test_files_decode_the_same(prepared: dict[str, QuantModel], kind: str, tmp_path: Path) -> None:
    qcompile.save(prepared[kind], tmp_path / "decoder.qcm")
    for mode in prepared[kind].prepared_modes:
        loaded = qcompile.load(tmp_path / "decoder.qcm", bits=mode)
        tokens, logits, _ = decode(qcompile.at(prepared[kind], mode), FIRST)
        found = decode(loaded, FIRST)
        assert torch.equal(found[0], tokens)
        assert torch.equal(found[1], logits)


def check_target(model: QuantModel, mode: int | str, target: str, **options: Any) -> None:
    """The lowered model decodes the same tokens, and every one of its integers is exact."""
    wanted, logits, calls = decode(qcompile.at(model, mode), FIRST)
    compiled = qcompile.lower(model, target, bits=mode, batch=2, threads=1, **options)
    tokens, found, _ = decode(compiled, FIRST)
    assert torch.equal(tokens, wanted)
    # softmax, GELU and layer normalisation are float and round differently, here by 5e-7 at most: that is far
    # from any quantiser's boundary for these tokens
    torch.testing.assert_close(found, logits, rtol=0, atol=1e-5)
    for call in (calls[0], calls[-1]):
        report = qcompile.verify(model, call, bits=mode, target=compiled)
        assert report.exact, report


@pytest.mark.parametrize("target", ["onnx-qdq", "onnx-packed"])
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_every_mode_decodes_the_same_in_onnx(
    prepared: dict[str, QuantModel], kind: str, mode: int | str, target: str
) -> None:
    check_target(prepared[kind], mode, target)


@pytest.mark.slow
@pytest.mark.skipif("avx2" not in FLAGS or shutil.which("gcc") is None, reason="needs AVX2, and gcc")
@pytest.mark.parametrize(("kind", "mode"), CASES)
def test_every_mode_decodes_the_same_in_machine_code(
    prepared: dict[str, QuantModel], kind: str, mode: int | str
) -> None:
    pytest.importorskip("tvm")
    check_target(prepared[kind], mode, "x86", features=("avx2",))
