"""Keys of the TOML file that the bmaltais GUI (kohya_ss, 45088f04) writes and that are no options of sd-scripts' own
LoRA trainers, which pass them over (kohya_gui/lora_gui.py:2145-2585)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# done by others of its keys
DONE = {
    "epoch": "max_train_steps or max_train_epochs",
    "noise_offset_type": "noise_offset or multires_noise_iterations",
}
# has no effect in sd-scripts' LoRA trainers either
NO_EFFECT = {
    "stop_text_encoder_training": "text encoders are trained to the end, as in sd-scripts; --text_encoder_lr 0 does not"
    " train them",
    "mem_eff_save": "adapters are small",
    "single_blocks_to_swap": "sd-scripts has it for whole models alone",
    "double_blocks_to_swap": "sd-scripts has it for whole models alone",
}
# of models that are not trained here
_SD3 = ("clip_g", "clip_g_dropout_rate", "clip_l_dropout_rate", "enable_scaled_pos_embed", "pos_emb_random_crop_rate",
        "save_clip", "save_t5xxl", "t5_dropout_rate", "t5xxl_device", "t5xxl_dtype")  # fmt: skip
_HUNYUAN = ("text_encoder", "byt5", "fp8_scaled", "fp8_vl", "text_encoder_cpu")
_LUMINA = ("gemma2", "gemma2_max_token_length", "system_prompt", "use_flash_attn", "use_sage_attn")
_ANIMA = ("qwen3", "llm_adapter_path", "t5_tokenizer_path", "qwen3_max_token_length", "t5_max_token_length",
          "vae_disable_cache", "unsloth_offload_checkpointing", "compile_backend", "compile_mode", "compile_dynamic",
          "compile_fullgraph", "compile_cache_size_limit")  # fmt: skip
_SEVERAL = ("attn_mode", "split_attn", "vae_chunk_size")
OTHER_MODELS = {
    key: model
    for model, keys in {
        "Stable Diffusion 3": _SD3,
        "HunyuanImage": _HUNYUAN,
        "Lumina": _LUMINA,
        "Anima": _ANIMA,
        "HunyuanImage and Anima": _SEVERAL,
    }.items()
    for key in keys
}
KEYS = DONE.keys() | NO_EFFECT.keys() | OTHER_MODELS.keys()


def remarks(given: Mapping[str, Any]) -> Iterator[str]:
    """What becomes of these keys, a line each, where it is not what they ask for."""
    for key, why in NO_EFFECT.items():
        if given.get(key):
            yield f"{key} = {given[key]!r}: no effect; {why}"


def refusals(given: Mapping[str, Any]) -> Iterator[str]:
    """Those that ask for another model."""
    for key, model in OTHER_MODELS.items():
        if given.get(key):
            yield f"'{key}' is for {model}, which is not trained here"
