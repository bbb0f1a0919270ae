"""Architectures from transformers, of two layers or so, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from zoo_entry import Architecture

transformers.logging.set_verbosity_error()  # it remarks on token ids that configurations leave at their defaults
Inputs = Callable[[], dict[str, Any]]

WORDS = {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
BERT = LAYERS | WORDS
LLAMA = BERT | {"num_key_value_heads": 2, "max_position_embeddings": 32, "use_cache": False}
GPT = WORDS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32, "use_cache": False}
PATCHES = LAYERS | {"image_size": 32, "patch_size": 8}
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_position_embeddings": 32}
STAGES = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}
SPEECH = LAYERS | {
    "vocab_size": 32,
    "conv_dim": [32, 32, 32],
    "conv_kernel": [10, 3, 3],
    "conv_stride": [5, 2, 2],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "apply_spec_augment": False,
}
BOTH_WAYS = WORDS | {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "use_cache": False,
}
WHISPER = BOTH_WAYS | {
    "num_mel_bins": 20,
    "max_source_positions": 50,
    "max_target_positions": 16,
    "decoder_start_token_id": 1,
}


def tokens(length: int = 12) -> Tensor:
    return torch.randint(3, 200, (2, length))


def _text(length: int = 12) -> Inputs:
    return lambda: {"input_ids": tokens(length)}


def _masked() -> dict[str, Any]:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 9:] = 0
    return {"input_ids": tokens(), "attention_mask": mask}


def _both() -> dict[str, Any]:
    return {"input_ids": tokens(), "decoder_input_ids": tokens(8)}


def _pixels(side: int = 32, samples: int = 2) -> Inputs:
    return lambda: {"pixel_values": torch.randn(samples, 3, side, side)}


def _noise(name: str, *shape: int) -> Inputs:
    return lambda: {name: torch.randn(shape)}


def _of(config: str, network: str, inputs: Inputs, **options: Any) -> Architecture:
    """A network by the names of its classes."""

    def build() -> nn.Module:
        return getattr(transformers, network)(getattr(transformers, config)(**options))

    return Architecture(build, inputs)


def _decoder(family: str, **options: Any) -> Architecture:
    """A language model that is configured as Llama is."""
    return _of(f"{family}Config", f"{family}ForCausalLM", _text(), **(LLAMA | options))


def _detr() -> nn.Module:
    backbone = transformers.ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 48, 64],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage4"],
    )
    attention = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "num_queries": 5}
    return transformers.DetrForObjectDetection(
        transformers.DetrConfig(
            backbone_config=backbone,
            use_timm_backbone=False,
            encoder_ffn_dim=64,
            decoder_ffn_dim=64,
            **attention,
            **sizes,
        )
    )


def _clip() -> nn.Module:
    text = BERT | {"max_position_embeddings": 32}
    config = transformers.CLIPConfig(text_config=text, vision_config=PATCHES, projection_dim=32)
    return transformers.CLIPModel(config)


LANGUAGE = {
    "bert": _of("BertConfig", "BertForSequenceClassification", _masked, **BERT),
    "roberta": _of("RobertaConfig", "RobertaForTokenClassification", _masked, **BERT),
    "distilbert": _of(
        "DistilBertConfig",
        "DistilBertForQuestionAnswering",
        _masked,
        dim=64,
        n_layers=2,
        n_heads=4,
        hidden_dim=128,
        **WORDS,
    ),
    "albert": _of("AlbertConfig", "AlbertForMaskedLM", _masked, embedding_size=32, **BERT),
    "electra": _of("ElectraConfig", "ElectraForPreTraining", _masked, embedding_size=32, **BERT),
    "deberta": _of("DebertaConfig", "DebertaModel", _masked, max_relative_positions=16, **DEBERTA),
    "deberta_v2": _of(
        "DebertaV2Config",
        "DebertaV2ForSequenceClassification",
        _masked,
        position_buckets=16,
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        **DEBERTA,
    ),
    "mpnet": _of("MPNetConfig", "MPNetModel", _masked, **BERT),
    "convbert": _of("ConvBertConfig", "ConvBertModel", _masked, embedding_size=32, **BERT),
    "squeezebert": _of("SqueezeBertConfig", "SqueezeBertModel", _masked, embedding_size=64, **BERT),
    "xlnet": _of("XLNetConfig", "XLNetModel", _text(), d_model=64, n_layer=2, n_head=4, d_inner=128, **WORDS),
    "funnel": _of(
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
    "fnet": _of(
        "FNetConfig",
        "FNetModel",
        _text(),
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        **WORDS,
    ),
    "longformer": _of("LongformerConfig", "LongformerModel", _text(16), attention_window=[4, 4], **BERT),
    "gpt2": _of("GPT2Config", "GPT2LMHeadModel", _text(), **GPT),
    "gptj": _of("GPTJConfig", "GPTJForCausalLM", _text(), rotary_dim=8, **GPT),
    "gpt_neox": _of("GPTNeoXConfig", "GPTNeoXForCausalLM", _text(), use_cache=False, **BERT),
    "bloom": _of(
        "BloomConfig",
        "BloomForCausalLM",
        _text(),
        hidden_size=64,
        n_layer=2,
        n_head=4,
        use_cache=False,
        **WORDS,
    ),
    "opt": _of(
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
    "mamba": _of(
        "MambaConfig",
        "MambaForCausalLM",
        _text(8),
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
        use_cache=False,
        **WORDS,
    ),
    "t5": _of(
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
    "t5_encoder": _of(
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
    "bart": _of("BartConfig", "BartModel", _both, max_position_embeddings=32, **BOTH_WAYS),
}
VISION = {
    "vit": _of("ViTConfig", "ViTForImageClassification", _pixels(), **PATCHES),
    "deit": _of("DeiTConfig", "DeiTForImageClassificationWithTeacher", _pixels(), **PATCHES),
    "beit": _of(
        "BeitConfig", "BeitForImageClassification", _pixels(), use_relative_position_bias=True, **PATCHES
    ),
    "dinov2": _of("Dinov2Config", "Dinov2Model", _pixels(), **PATCHES),
    "yolos": _of(
        "YolosConfig",
        "YolosForObjectDetection",
        _pixels(),
        num_detection_tokens=5,
        **(PATCHES | {"image_size": [32, 32]}),
    ),
    "detr": Architecture(_detr, _pixels(64)),
    "swin": _of(
        "SwinConfig",
        "SwinForImageClassification",
        _pixels(),
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
    ),
    "swin_v2": _of(
        "Swinv2Config",
        "Swinv2ForImageClassification",
        _pixels(),
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=4,
    ),
    "mobilevit": _of(
        "MobileViTConfig",
        "MobileViTForImageClassification",
        _pixels(64),
        image_size=64,
        hidden_sizes=[32, 32, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
        num_attention_heads=2,
    ),
    "segformer": _of(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        _pixels(64),
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        **STAGES,
    ),
    "pvt": _of(
        "PvtConfig",
        "PvtForImageClassification",
        _pixels(64),
        image_size=64,
        num_attention_heads=[1, 2, 2, 4],
        **STAGES,
    ),
    "levit": _of(
        "LevitConfig",
        "LevitForImageClassification",
        _pixels(64, 4),
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "convnext": _of("ConvNextConfig", "ConvNextForImageClassification", _pixels(64), **STAGES),
    "convnext_v2": _of("ConvNextV2Config", "ConvNextV2ForImageClassification", _pixels(64), **STAGES),
    "poolformer": _of("PoolFormerConfig", "PoolFormerForImageClassification", _pixels(64), **STAGES),
    "focalnet": _of(
        "FocalNetConfig",
        "FocalNetForImageClassification",
        _pixels(),
        image_size=32,
        embed_dim=16,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "perceiver": _of(
        "PerceiverConfig",
        "PerceiverModel",
        _noise("inputs", 2, 10, 16),
        num_latents=8,
        d_latents=32,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
    ),
    "clip": Architecture(_clip, lambda: {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}),
    "clip_vision": _of("CLIPVisionConfig", "CLIPVisionModel", _pixels(), **PATCHES),
    "videomae": _of(
        "VideoMAEConfig",
        "VideoMAEModel",
        _noise("pixel_values", 2, 2, 3, 32, 32),
        num_frames=2,
        tubelet_size=2,
        **PATCHES,
    ),
}
SERIES = {
    "wav2vec2": _of("Wav2Vec2Config", "Wav2Vec2ForCTC", _noise("input_values", 2, 1600), **SPEECH),
    "hubert": _of("HubertConfig", "HubertForCTC", _noise("input_values", 2, 1600), **SPEECH),
    "wavlm": _of("WavLMConfig", "WavLMModel", _noise("input_values", 2, 1600), **SPEECH),
    "whisper": _of(
        "WhisperConfig",
        "WhisperModel",
        lambda: {"input_features": torch.randn(2, 20, 100), "decoder_input_ids": tokens(8)},
        **WHISPER,
    ),
    "whisper_encoder": Architecture(
        lambda: transformers.WhisperModel(transformers.WhisperConfig(**WHISPER)).encoder,
        _noise("input_features", 2, 20, 100),
    ),
    "audio_spectrogram": _of(
        "ASTConfig",
        "ASTForAudioClassification",
        _noise("input_values", 2, 64, 32),
        frequency_stride=8,
        time_stride=8,
        max_length=64,
        num_mel_bins=32,
        **PATCHES,
    ),
    "patchtst": _of(
        "PatchTSTConfig",
        "PatchTSTForPrediction",
        _noise("past_values", 2, 32, 3),
        num_input_channels=3,
        context_length=32,
        patch_length=8,
        patch_stride=8,
        prediction_length=8,
        d_model=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
    ),
}
ZOO = LANGUAGE | VISION | SERIES
