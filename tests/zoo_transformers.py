"""Architectures from transformers for images and sound, of two layers or so, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from zoo_entry import Architecture

transformers.logging.set_verbosity_error()  # it remarks on defaults of token ids
Inputs = Callable[[], dict[str, Any]]

WORDS = {"vocab_size": 200, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LAYERS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
BERT = LAYERS | WORDS
PATCHES = LAYERS | {"image_size": 32, "patch_size": 8}
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


def _pixels(side: int = 32, samples: int = 2) -> Inputs:
    return lambda: {"pixel_values": torch.randn(samples, 3, side, side)}


def noise(name: str, *shape: int) -> Inputs:
    return lambda: {name: torch.randn(shape)}


def of(config: str, network: str, inputs: Inputs, **options: Any) -> Architecture:
    """A network by the names of its classes."""

    def build() -> nn.Module:
        return getattr(transformers, network)(getattr(transformers, config)(**options))

    return Architecture(build, inputs)


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


VISION = {
    "vit": of("ViTConfig", "ViTForImageClassification", _pixels(), **PATCHES),
    "deit": of("DeiTConfig", "DeiTForImageClassificationWithTeacher", _pixels(), **PATCHES),
    "beit": of(
        "BeitConfig", "BeitForImageClassification", _pixels(), use_relative_position_bias=True, **PATCHES
    ),
    "dinov2": of("Dinov2Config", "Dinov2Model", _pixels(), **PATCHES),
    "yolos": of(
        "YolosConfig",
        "YolosForObjectDetection",
        _pixels(),
        num_detection_tokens=5,
        **(PATCHES | {"image_size": [32, 32]}),
    ),
    "detr": Architecture(_detr, _pixels(64)),
    "swin": of(
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
    "swin_v2": of(
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
    "mobilevit": of(
        "MobileViTConfig",
        "MobileViTForImageClassification",
        _pixels(64),
        image_size=64,
        hidden_sizes=[32, 32, 32],
        neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32],
        num_attention_heads=2,
    ),
    "segformer": of(
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        _pixels(64),
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=32,
        **STAGES,
    ),
    "pvt": of(
        "PvtConfig",
        "PvtForImageClassification",
        _pixels(64),
        image_size=64,
        num_attention_heads=[1, 2, 2, 4],
        **STAGES,
    ),
    "levit": of(
        "LevitConfig",
        "LevitForImageClassification",
        _pixels(64, 4),
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
    ),
    "convnext": of("ConvNextConfig", "ConvNextForImageClassification", _pixels(64), **STAGES),
    "convnext_v2": of("ConvNextV2Config", "ConvNextV2ForImageClassification", _pixels(64), **STAGES),
    "poolformer": of("PoolFormerConfig", "PoolFormerForImageClassification", _pixels(64), **STAGES),
    "focalnet": of(
        "FocalNetConfig",
        "FocalNetForImageClassification",
        _pixels(),
        image_size=32,
        embed_dim=16,
        depths=[1, 1],
        focal_levels=[2, 2],
        focal_windows=[3, 3],
    ),
    "perceiver": of(
        "PerceiverConfig",
        "PerceiverModel",
        noise("inputs", 2, 10, 16),
        num_latents=8,
        d_latents=32,
        d_model=16,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=2,
    ),
    "clip": Architecture(_clip, lambda: {"input_ids": tokens(), "pixel_values": torch.randn(2, 3, 32, 32)}),
    "clip_vision": of("CLIPVisionConfig", "CLIPVisionModel", _pixels(), **PATCHES),
    "videomae": of(
        "VideoMAEConfig",
        "VideoMAEModel",
        noise("pixel_values", 2, 2, 3, 32, 32),
        num_frames=2,
        tubelet_size=2,
        **PATCHES,
    ),
}
SERIES = {
    "wav2vec2": of("Wav2Vec2Config", "Wav2Vec2ForCTC", noise("input_values", 2, 1600), **SPEECH),
    "hubert": of("HubertConfig", "HubertForCTC", noise("input_values", 2, 1600), **SPEECH),
    "wavlm": of("WavLMConfig", "WavLMModel", noise("input_values", 2, 1600), **SPEECH),
    "whisper": of(
        "WhisperConfig",
        "WhisperModel",
        lambda: {"input_features": torch.randn(2, 20, 100), "decoder_input_ids": tokens(8)},
        **WHISPER,
    ),
    "whisper_encoder": Architecture(
        lambda: transformers.WhisperModel(transformers.WhisperConfig(**WHISPER)).encoder,
        noise("input_features", 2, 20, 100),
    ),
    "audio_spectrogram": of(
        "ASTConfig",
        "ASTForAudioClassification",
        noise("input_values", 2, 64, 32),
        frequency_stride=8,
        time_stride=8,
        max_length=64,
        num_mel_bins=32,
        **PATCHES,
    ),
    "patchtst": of(
        "PatchTSTConfig",
        "PatchTSTForPrediction",
        noise("past_values", 2, 32, 3),
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
ZOO = VISION | SERIES
