"""Architectures from transformers for text, of two layers or so, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from zoo_entry import Architecture
from zoo_transformers import BERT, BOTH_WAYS, WORDS, Inputs, of, tokens

LLAMA = BERT | {"num_key_value_heads": 2, "max_position_embeddings": 32, "use_cache": False}
GPT = WORDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32}


def _text(length: int = 12) -> Inputs:
    return lambda: {"input_ids": tokens(length)}


def _masked() -> dict[str, Any]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def _both() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(8)}


def _decoder(family: str, **options: Any) -> Architecture:
    """A language model that is configured as Llama is."""
    return of(f"{family}Config", f"{family}ForCausalLM", _text(), **(LLAMA | options))


ZOO = {
    "bert": of("BertConfig", "BertForSequenceClassification", _masked, **BERT),
    "roberta": of("RobertaConfig", "RobertaForTokenClassification", _masked, **BERT),
    "distilbert": of(
        "DistilBertConfig",
        "DistilBertForQuestionAnswering",
        _masked,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=128,
        **WORDS,
    ),
    "albert": of("AlbertConfig", "AlbertForMaskedLM", _masked, embedding_size=32, **BERT),
    "electra": of("ElectraConfig", "ElectraForPreTraining", _masked, embedding_size=32, **BERT),
    "deberta": of("DebertaConfig", "DebertaModel", _masked, max_relative_positions=16, **DEBERTA),
    "deberta_v2": of(
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        _masked,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        **DEBERTA,
    ),
    "mpnet": of("MPNetConfig", "MPNetModel", _masked, **BERT),
    "convbert": of("ConvBertConfig", "ConvBertModel", _masked, embedding_size=32, **BERT),
    "squeezebert": of("SqueezeBertConfig", "SqueezeBertModel", _masked, embedding_size=64, **BERT),
    "xlnet": of("XLNetConfig", "XLNetModel", _text(), d_model=64, n_layer=2, n_head=4, d_inner=128, **WORDS),
    "funnel": of(
        "FunnelConfig",
        "FunnelModel",
        _text(16),
        block_sizes=[1, 1],
        d_model=64,
        n_head=4,
        d_head=16,
        d_inner=128,
        num_decoder_layers=1,
        **WORDS,
    ),
    "fnet": of(
        "FNetConfig",
        "FNetModel",
        _text(),
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        **WORDS,
    ),
    "longformer": of("LongformerConfig", "LongformerModel", _text(16), attention_window=[4, 4], **BERT),
    "gpt2": of("GPT2Config", "GPT2LMHeadModel", _text(), **GPT),
    "gptj": of("GPTJConfig", "GPTJForCausalLM", _text(), rotary_dim=8, **GPT),
    "gpt_neox": of("GPTNeoXConfig", "GPTNeoXForCausalLM", _text(), use_cache=False, **BERT),
    "bloom": of(
        "BloomConfig",
        "BloomForCausalLM",
        _text(),
        hidden_size=64,
        n_layer=2,
        n_head=4,
        use_cache=False,
        **WORDS,
    ),
    "opt": of(
        "OPTConfig",
        "OPTForCausalLM",
        _text(),
        ffn_dim=128,
        word_embed_proj_dim=64,
        max_position_embeddings=32,
        use_cache=False,
        **BERT,
    ),
    "llama": _decoder("Llama"),
    "mistral": _decoder("Mistral"),
    "qwen3": _decoder("Qwen3", head_dim=16),
    "gemma2": _decoder("Gemma2", head_dim=16),
    "phi3": _decoder("Phi3"),
    "cohere": _decoder("Cohere"),
    "mixtral": _decoder("Mixtral"),
    "mixtral_batched": _decoder("Mixtral", experts_implementation="batched_mm"),
    "mamba": of(
        "MambaConfig",
        "MambaForCausalLM",
        _text(8),
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        use_cache=False,
        **WORDS,
    ),
    "t5": of(
        "T5Config",
        "T5ForConditionalGeneration",
        _both,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        use_cache=False,
        decoder_start_token_id=0,
        **WORDS,
    ),
    "t5_encoder": of(
        "T5Config",
        "T5EncoderModel",
        _text(),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        **WORDS,
    ),
    "bart": of("BartConfig", "BartModel", _both, max_position_embeddings=32, **BOTH_WAYS),
}
