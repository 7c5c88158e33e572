"""A small FLUX.1 with random weights: a Diffusers folder, and single files in sd-scripts' and ComfyUI's forms."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from diffusers.loaders import single_file_utils
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

from library.models.reading import CONFIGS
from library.world import tokenizer as clip_tokenizer

WIDTH, TEXT = 128, 32  # of the transformer, one head of the published models' width; and of both text encoders
VAE = {"block_out_channels": [32] * 4, "layers_per_block": 1, "sample_size": 64}  # in sd-scripts, 32 groups always
CLIP = {"hidden_size": TEXT, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
T5 = {"d_model": TEXT, "d_kv": 16, "d_ff": 64, "num_heads": 2, "num_layers": 2}


@dataclass(frozen=True)
class SmallFlux:
    """:param folder: of Diffusers, float32; `config.json` in its parts
    :param tokenizers: as sd-scripts' `--tokenizer_cache_dir`
    :param parts: "transformer", "clip_l", "t5xxl", "ae": the tensors of their files
    """

    folder: Path
    tokenizers: Path
    parts: dict[str, dict[str, Tensor]]

    def files(self, to: Path) -> dict[str, Path]:
        """Each part as a file, by the name of its option; the transformer for --pretrained_model_name_or_path."""
        names = {"transformer": "pretrained_model_name_or_path"}
        found = {names.get(name, name): to / f"{name}.safetensors" for name in self.parts}
        for path, tensors in zip(found.values(), self.parts.values(), strict=True):
            save_file(tensors, path)
        return found

    def all_in_one(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """ComfyUI's checkpoints: the weights of layers in a type of 8 bits, perhaps, the VAE in float32."""
        prefixes = {"transformer": "model.diffusion_model.", "clip_l": "text_encoders.clip_l.transformer.",
                    "t5xxl": "text_encoders.t5xxl.transformer.", "ae": "vae."}  # fmt: skip
        return {
            prefixes[part] + name: tensor if part == "ae" else tensor.to(dtype)
            for part, tensors in self.parts.items()
            for name, tensor in tensors.items()
        }


def build(to: Path, dev: bool = True) -> SmallFlux:
    """The same weights every time."""
    transformers.logging.disable_progress_bar()
    folder = to / "model"
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        clip = clip_tokenizer.build(to / "tokenizers" / "openai_clip-vit-large-patch14")
        t5 = t5_tokenizer(to / "tokenizers" / "google_t5-v1_1-xxl")
        ids = {"bos_token_id": clip.bos_token_id, "eos_token_id": clip.eos_token_id, "vocab_size": len(clip)}
        original = transformer_tensors(dev)
        transformer = FluxTransformer2DModel.from_config(
            config("transformer")
            | {"num_layers": 2, "num_single_layers": 3, "num_attention_heads": 1, "guidance_embeds": dev}
            | {"joint_attention_dim": TEXT, "pooled_projection_dim": TEXT}
        )
        converter = of_small_width(single_file_utils.convert_flux_transformer_checkpoint_to_diffusers)
        transformer.load_state_dict(converter(dict(original)))
        pipeline = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(
                config("scheduler", "scheduler_config.json")
                | ({} if dev else {"shift": 1.0, "use_dynamic_shifting": False})
            ),
            vae=AutoencoderKL.from_config(config("vae") | VAE),
            text_encoder=CLIPTextModel(CLIPTextConfig(**config("text_encoder") | CLIP | ids)),
            tokenizer=clip,
            text_encoder_2=T5EncoderModel(T5Config(**config("text_encoder_2") | T5 | {"vocab_size": len(t5)})),
            tokenizer_2=t5,
            transformer=transformer,
        )
    pipeline.save_pretrained(str(folder))
    states = {name: getattr(pipeline, name).state_dict() for name in ("text_encoder", "text_encoder_2", "vae")}
    parts = {
        "transformer": original,
        "clip_l": {
            f"text_model.{key.removeprefix('text_model.')}": value for key, value in states["text_encoder"].items()
        },
        "t5xxl": {key: value for key, value in states["text_encoder_2"].items() if "embed_tokens" not in key},
        "ae": _original_vae(states["vae"]),
    }
    return SmallFlux(folder, to / "tokenizers", parts)


def config(part: str, file: str = "config.json") -> dict:
    return json.loads((CONFIGS / "flux" / part / file).read_text(encoding="utf-8"))


def t5_tokenizer(folder: Path) -> T5TokenizerFast:
    """A token for each letter."""
    folder.mkdir(parents=True)
    letters = ["<pad>", "</s>", "<unk>", "▁", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.Unigram([(letter, -1.0) for letter in letters], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return T5TokenizerFast.from_pretrained(str(folder))


def transformer_tensors(
    dev: bool, double: int = 2, single: int = 3, w: int = WIDTH, text: int = TEXT, pooled: int = TEXT
) -> dict[str, Tensor]:
    """In black-forest-labs' names and shapes.

    :param w: the width; those of T5 and CLIP are `text` and `pooled`
    """
    layers = {"img_in": (w, 64), "txt_in": (w, text), "final_layer.linear": (64, w),
              "final_layer.adaLN_modulation.1": (2 * w, w)}  # fmt: skip
    for name, width in (("time_in", 256), ("vector_in", pooled), *([("guidance_in", 256)] if dev else [])):
        layers |= {f"{name}.in_layer": (w, width), f"{name}.out_layer": (w, w)}
    for block in (f"double_blocks.{i}.{of}" for i in range(double) for of in ("img", "txt")):
        layers |= {f"{block}_mod.lin": (6 * w, w), f"{block}_attn.qkv": (3 * w, w), f"{block}_attn.proj": (w, w),
                   f"{block}_mlp.0": (4 * w, w), f"{block}_mlp.2": (w, 4 * w)}  # fmt: skip
    for block in (f"single_blocks.{i}" for i in range(single)):
        layers |= {
            f"{block}.modulation.lin": (3 * w, w),
            f"{block}.linear1": (7 * w, w),
            f"{block}.linear2": (w, 5 * w),
        }
    norms = [f"double_blocks.{i}.{of}_attn.norm" for i in range(double) for of in ("img", "txt")]
    norms += [f"single_blocks.{i}.norm" for i in range(single)]
    tensors = {f"{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in layers.items()}
    tensors |= {f"{name}.bias": 0.1 * torch.randn(shape[0]) for name, shape in layers.items()}
    return tensors | {f"{name}.{of}_norm.scale": 0.5 + torch.rand(128) for name in norms for of in ("query", "key")}


def of_small_width(converter: Callable) -> Callable:
    """One of diffusers' converters, which know the published width alone."""
    code, space = inspect.getsource(converter), dict(converter.__globals__)
    assert "3072" in code
    exec(code.replace("12288", str(4 * WIDTH)).replace("3072", str(WIDTH)), space)
    return space[converter.__name__]


def _original_vae(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renames = (
        (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
        (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
        (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
        (r"mid_block\.resnets\.0", "mid.block_1"), (r"mid_block\.resnets\.1", "mid.block_2"),
        (r"mid_block\.attentions\.0", "mid.attn_1"), (r"attn_1\.group_norm", "attn_1.norm"), (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"), ("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
    )  # fmt: skip
    tensors = {}
    for key, value in state.items():
        for pattern, name in renames:
            key = re.sub(pattern, name, key)
        tensors[key] = value[..., None, None] if value.dim() == 2 else value
    return tensors
