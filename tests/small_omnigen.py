"""A small OmniGen with random weights: a Diffusers folder, made without the pipeline, which needs torchvision."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, OmniGenTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|user|>", "<|assistant|>", "<|end|>", "<|diffusion|>", "<img>", "</img>", "<cfg>")
VAE = {"block_out_channels": [32] * 4, "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32,
       "sample_size": 64, "scaling_factor": 0.13025, "down_block_types": ["DownEncoderBlock2D"] * 4,
       "up_block_types": ["UpDecoderBlock2D"] * 4}  # fmt: skip


def build(to: Path, **changes: Any) -> Path:
    """A folder in diffusers' layout, float32; the same weights every time.

    :param changes: of the transformer's configuration
    """
    sizes: dict[str, Any] = {
        "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 48, "num_layers": 2,
        "in_channels": 4, "time_step_dim": 16, "pad_token_id": 0, "pos_embed_max_size": 32,
        "max_position_embeddings": 4096, "original_max_position_embeddings": 1024,
        "rope_scaling": {"short_factor": [1.0, 1.1, 1.2, 1.4], "long_factor": [1.0, 1.5, 2.5, 6.0]},
    }  # fmt: skip
    folder = to / "model"
    tokens = tokenizer(folder / "tokenizer")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        transformer = OmniGenTransformer2DModel(**(sizes | {"vocab_size": len(tokens)} | changes))
        for name, weight in transformer.named_parameters():  # no picture would show what stands before its last layer
            if weight.dim() > 1 and "embed_tokens" not in name:
                torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
        vae = AutoencoderKL(**VAE)
    transformer.save_pretrained(str(folder / "transformer"), max_shard_size="60KB")  # in shards, as the published one
    vae.save_pretrained(str(folder / "vae"))
    schedule = FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1)
    schedule.save_pretrained(str(folder / "scheduler"))
    parts = {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "vae": ["diffusers", "AutoencoderKL"],
             "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
             "transformer": ["diffusers", "OmniGenTransformer2DModel"]}  # fmt: skip
    index = {"_class_name": "OmniGenPipeline", "_diffusers_version": "0.42.1", **parts}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A token for each byte, and those that OmniGen's texts are made with; the ids of the first three are the
    published ones."""
    folder.mkdir(parents=True)
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL]
    made = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>", *SPECIAL])
    found = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
                                    pad_token="</s>")  # fmt: skip
    found.save_pretrained(str(folder))
    return found
