"""FLUX.1: dev, which is told its guidance, and schnell, which is not."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers import FluxTransformer2DModel as Transformer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (  # type: ignore[attr-defined]  # 5 knows T5TokenizerFast as another name of T5Tokenizer
    CLIPTextConfig,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from library.models import samplers
from library.models.clip import WINDOW, Reader, cleaned
from library.models.family import Family, Text
from library.models.outline import Encoder, Outline, config_of, pixels_per_latent
from library.models.reading import (
    CONFIGS,
    blank,
    find_tokenizer,
    other_than,
    part_of_folder,
    shapes_of,
    tokenizer_from,
    whole,
)
from library.options.rooms import ModelOptions
from library.prompts import Prompt
from library.transfer import sent
from networks import deft_architectures
from networks.deft_config import DeftError, reason_of

logger = logging.getLogger(__name__)

T5_XXL = "google/t5-v1_1-xxl"


class Flux(Family):
    """See `Family`."""

    objective = "flow"

    def __init__(self, path: Path, pipeline: DiffusionPipeline, options: ModelOptions):
        super().__init__(path, pipeline, options)
        self.tokens = _t5_tokens(options, self.is_dev)
        if options.apply_t5_attn_mask:
            self.denoiser.register_forward_pre_hook(_leave_padding_out, with_kwargs=True)
        for part in pipeline.transformer.modules():
            if isinstance(part, nn.RMSNorm):
                part.forward = functools.partial(_as_it_is, part.forward)  # type: ignore[method-assign]

    @property
    def denoiser(self) -> nn.Module:
        """See `Family`."""
        return self.pipeline.transformer

    @property
    def text_encoders(self) -> list[nn.Module]:
        """See `Family`: CLIP-L's and T5-XXL's."""
        encoders = self.pipeline.text_encoder, self.pipeline.text_encoder_2
        return [encoder for encoder in encoders if encoder is not None]

    @property
    def multiple_of(self) -> int:
        """See `Family`: a token is 2 x 2 latents."""
        return 2 * self.pixels_per_latent

    def swappable(self) -> list[tuple[nn.Module, ...]]:
        """See `Family`: as sd-scripts counts, two single blocks are one."""
        transformer = self.pipeline.transformer
        single = list(transformer.single_transformer_blocks)
        pairs = [tuple(single[i : i + 2]) for i in range(0, len(single), 2)]
        return [*((block,) for block in transformer.transformer_blocks), *pairs]

    @property
    def is_dev(self) -> bool:
        """Whether it is told its guidance."""
        return self.pipeline.transformer.config.guidance_embeds

    def encode_text(self, captions: list[str], inputs: Sequence[Sequence[Tensor]] = ()) -> Text:
        """`pooled` (b, 768) of CLIP; `hidden` (b, tokens, 4096) of T5, 0 for what --apply_t5_attn_mask leaves out."""
        clip, t5 = self.pipeline.text_encoder, self.pipeline.text_encoder_2
        read = clip.config.max_position_embeddings
        short = self._tokens_of(self.pipeline.tokenizer, list(map(cleaned, captions)), read)
        long = self._tokens_of(self.pipeline.tokenizer_2, captions, self.tokens)
        ids, mask = sent(long.input_ids, t5.device), sent(long.attention_mask, t5.device)
        pooled = clip(sent(short.input_ids, clip.device)).pooler_output
        if not self.options.apply_t5_attn_mask:
            return {"pooled": pooled, "hidden": t5(ids)[0]}
        return {"pooled": pooled, "hidden": t5(ids, mask)[0].where(mask.bool()[..., None], 0)}

    @staticmethod
    def _tokens_of(tokenizer: Any, captions: list[str], length: int) -> Any:
        return tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")

    def reading(self) -> dict[str, Any]:
        """See `Family`."""
        mask = self.options.apply_t5_attn_mask
        return {"family": type(self).__name__, "tokens": self.tokens, "apply_t5_attn_mask": mask}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        """See `Family`: noise - latents, by a model that has learnt it."""
        b, _, height, width = noisy.shape
        hidden = text["hidden"].to(noisy)
        one, rows, columns = (torch.arange(n, device=noisy.device) for n in (1, height // 2, width // 2))
        places = torch.cartesian_prod(one, rows, columns).float()
        answer = self.pipeline.transformer(
            hidden_states=F.pixel_unshuffle(noisy, 2).flatten(2).mT,
            encoder_hidden_states=hidden,
            pooled_projections=text["pooled"].to(noisy),
            timestep=timesteps.to(_computed_in(noisy)) / 1000,
            img_ids=places,
            txt_ids=places.new_zeros(hidden.shape[1], 3),
            guidance=noisy.new_full((b,), self.options.guidance_scale) if self.is_dev else None,
        ).sample
        return _unpacked(answer, len(rows), len(columns))

    def drawn(self, prompt: Prompt, *asked: Any) -> Tensor:
        """See `Family`: the pipeline's latents are tokens, (1, tokens, 64)."""
        size = prompt.height // self.multiple_of, prompt.width // self.multiple_of
        return _unpacked(super().drawn(prompt, *asked), *size)

    def beyond(self, caption: str) -> tuple[str, int]:
        """See `Family`: what T5 does not read."""
        encoder = _t5_outline(self.pipeline.tokenizer_2, self.tokens)
        return encoder.beyond(caption), encoder.length

    def drawing_inputs(self, prompt: Text, negative: Text | None) -> dict[str, Tensor]:
        """See `Family`."""
        texts = {"": prompt} if negative is None else {"": prompt, "negative_": negative}
        names = {"prompt_embeds": "hidden", "pooled_prompt_embeds": "pooled"}
        return {who + name: text[key] for who, text in texts.items() for name, key in names.items()}

    def guidance(self, prompt: Prompt) -> dict[str, float]:
        """See `Family`: as in sd-scripts, `--g` is what dev is told, 3.5 by default, and `--l` is of classifier-free
        guidance, off by default."""
        told = 3.5 if prompt.embedded_guidance is None else prompt.embedded_guidance
        return {"guidance_scale": told, "true_cfg_scale": 1.0 if prompt.guidance is None else prompt.guidance}

    def sampler(self, name: str | None) -> Any:
        """See `Family`: Euler's, with the model's own shift."""
        samplers.tell_euler_alone(name, "FLUX.1")
        return FlowMatchEulerDiscreteScheduler.from_config(self.pipeline.scheduler.config)

    def names(self) -> dict[str, str]:
        """See `Family`: the fields of sd-scripts' flux_train_network.py (commit 48d368fa)."""
        return {
            "ss_v2": "False",
            "ss_base_model_version": "flux1",
            "ss_sd_model_name": self.path.name,
            "ss_model_type": "flux",
            "ss_apply_t5_attn_mask": str(self.options.apply_t5_attn_mask),
            "ss_guidance_scale": str(self.options.guidance_scale),
            "modelspec.architecture": f"flux-1-{'dev' if self.is_dev else 'schnell'}/lora",
            "modelspec.implementation": "https://github.com/black-forest-labs/flux",
        }


def _computed_in(tensor: Tensor) -> torch.dtype:
    """What a model's layers compute in. Its timesteps are rounded to that before they are divided, in a training of
    sd-scripts' as in diffusers' pipeline; behind it, others come out in bf16."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def _unpacked(tokens: Tensor, rows: int, columns: int) -> Tensor:
    """(b, rows * columns, 4 c) -> (b, c, 2 rows, 2 columns)."""
    return F.pixel_shuffle(tokens.mT.unflatten(2, (rows, columns)), 2)


def _leave_padding_out(transformer: nn.Module, given: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Text that is 0 is not attended to, in any block; a hook, so that pictures are drawn as the training computes."""
    text, picture = named["encoder_hidden_states"], named["hidden_states"]
    tokens = text.ne(0).any(-1)
    mask = torch.cat([tokens, tokens.new_ones(picture.shape[:2])], 1)[:, None, None]
    more = named.get("joint_attention_kwargs") or {}
    return given, named | {"joint_attention_kwargs": {**more, "attention_mask": mask}}


def _as_it_is(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Since torch 2.12, autocast widens what is normed: queries and keys, then all that a single block puts beside what
    they attend to. Kernels of others do not take them beside values in bf16. The norm computes in float32 anyway."""
    with torch.autocast(x.device.type, enabled=False):
        return norm(x)


# --- loading ---------------------------------------------------------------------------------------------------------

CONFIG = CONFIGS / "flux"
# part of the pipeline -> its option, and what stands before its tensors' names in a file that holds all parts
_PARTS = {
    "text_encoder": ("clip_l", "text_encoders.clip_l.transformer."),
    "text_encoder_2": ("t5xxl", "text_encoders.t5xxl.transformer."),
    "vae": ("ae", "vae."),
}
_OF_OTHERS = (
    "v2",
    "v_parameterization",
    "zero_terminal_snr",
    "clip_skip",
    "max_token_length",
    "weighted_captions",
)  # other families' options
_CHANNELS = "img_in.weight"  # every FLUX.1 has it
# of diffusers' modules, those that networks.deft does not adapt: (their path, black-forest-labs' name)
_NOT_ADAPTED = (
    (r"^transformer_blocks\.(\d+)\.attn\.norm_([qk])$", r"double_blocks.\1.img_attn.norm.\2"),
    (r"^transformer_blocks\.(\d+)\.attn\.norm_added_([qk])$", r"double_blocks.\1.txt_attn.norm.\2"),
    (r"^single_transformer_blocks\.(\d+)\.attn\.norm_([qk])$", r"single_blocks.\1.norm.\2"),
    (r"\.norm\.q$", ".norm.query_norm"),
    (r"\.norm\.k$", ".norm.key_norm"),
)


def load(location: Path, options: ModelOptions, dtype: torch.dtype, empty: bool = False) -> Flux:
    """See `library.models.loading.load`; --clip_l, --t5xxl and --ae replace what a folder or file holds."""
    if options.vae:
        raise DeftError("--vae: FLUX.1's is given by --ae")
    unused = [f"--{name}" for name in _OF_OTHERS if getattr(options, name)]
    if unused:
        logger.warning(f"{', '.join(unused)}: without effect, FLUX.1 has nothing of the kind")
    files = {name: path for name, (option, _) in _PARTS.items() if (path := getattr(options, option))}
    _check_parts(location, files)
    try:
        more = _rest_of_folder if location.is_dir() else _rest_of_file
        rest = more(location, options, dtype, files.keys(), empty)
        given = {name: _given_part(name, path, dtype, empty) for name, path in files.items()}
        pipeline = FluxPipeline(**rest, **given)
    except DeftError:
        raise
    except Exception as error:  # what the libraries raise for files that are no model is of many kinds
        raise DeftError(f"{location}: not a readable FLUX.1 model ({reason_of(error)})") from error
    _check_widths(location, pipeline)
    for module in pipeline.text_encoder_2.modules():  # frozen, it is not to be random where checkpointing trains it
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    pipeline.set_progress_bar_config(disable=True)
    for name in ("transformer", *_PARTS):
        getattr(pipeline, name).requires_grad_(False).eval()
    return Flux(location, pipeline, options)


def outline(location: Path, options: ModelOptions) -> Outline:
    """See `library.models.loading.outline_of`."""
    found, config = _tokenizers(location, options), config_of(location, "text_encoder")
    positions = config.get("max_position_embeddings", WINDOW + 2)
    if location.is_dir():
        dev = config_of(location, "transformer").get("guidance_embeds", False)
    else:
        dev = any("guidance_in." in key for key in shapes_of(location))
    return Outline(
        2 * pixels_per_latent(location),
        (
            Reader(found["tokenizer"], 0, positions).outline("CLIP-L"),
            _t5_outline(found["tokenizer_2"], _t5_tokens(options, dev)),
        ),
    )


def _tokenizers(location: Path, options: ModelOptions) -> dict[str, Any]:
    """Those of the pipeline."""
    if location.is_dir():
        return {
            "tokenizer": tokenizer_from(options.tokenizer or str(location / "tokenizer")),
            "tokenizer_2": tokenizer_from(str(location / "tokenizer_2"), T5TokenizerFast),
        }
    return {
        "tokenizer": find_tokenizer(options.tokenizer, options.tokenizer_cache_dir),
        "tokenizer_2": find_tokenizer(None, options.tokenizer_cache_dir, T5_XXL, T5TokenizerFast),
    }


def _t5_tokens(options: ModelOptions, dev: bool) -> int:
    """That T5 reads, with the end."""
    return options.t5xxl_max_token_length or (512 if dev else 256)


def _t5_outline(tokenizer: Any, tokens: int) -> Encoder:
    return Encoder("T5", tokenizer, lambda caption: tokenizer(caption, verbose=False).input_ids[:-1], tokens - 1)


def _check_parts(location: Path, files: Mapping[str, str]) -> None:
    """Before any of them is loaded.

    :param files: a part of the pipeline -> what is given for it
    :raises DeftError: for all that are missing, are others, or cannot be read, in one line
    """
    faults = [found for name, path in files.items() if (found := _fault_of(name, Path(path)))]
    if location.is_file():
        held, wanted = shapes_of(location), (place for name, place in _PARTS.items() if name not in files)
        missing = [f"--{option}" for option, prefix in wanted if not any(key.startswith(prefix) for key in held)]
        if missing:
            faults.append(f"{location}: the transformer alone is in it; give {', '.join(missing)} too")
    if faults:
        raise DeftError("; ".join(faults))


def _fault_of(name: str, location: Path) -> str | None:
    """What is wrong with the file or folder that is given for a part, as far as headers say."""
    option = _PARTS[name][0]
    if not location.exists():
        return f"--{option}: no such file: {location}"
    if location.is_file() and location.suffix not in (".safetensors", ".sft"):
        return f"--{option} {location}: only .safetensors files are read, since others can run code; convert it first"
    files = [location] if location.is_file() else location.glob("*.safetensors")
    try:
        other = other_than(option, [key for file in files for key in shapes_of(file)])
    except DeftError as error:
        return f"--{option}: {error}"
    return f"--{option} {location}: {other}" if other else None


def _check_widths(location: Path, pipeline: FluxPipeline) -> None:
    """:raises DeftError: for parts that do not belong together, and for what is made out of more than text"""
    config, channels = pipeline.transformer.config, 4 * pipeline.vae.config.latent_channels
    if config.in_channels != channels:
        raise DeftError(
            f"{location}: its transformer takes {config.in_channels} channels for {channels}, as those of FLUX.1 Fill, "
            f"Canny and Depth do, which are not trained here"
        )
    for option, takes, gives in (
        ("clip_l", config.pooled_projection_dim, pipeline.text_encoder.config.hidden_size),
        ("t5xxl", config.joint_attention_dim, pipeline.text_encoder_2.config.d_model),
    ):
        if takes != gives:
            raise DeftError(
                f"--{option}: its width is {gives}, and the transformer takes {takes}; give the one of FLUX.1"
            )


def _rest_of_folder(
    location: Path, options: ModelOptions, dtype: torch.dtype, there: Collection[str], empty: bool
) -> dict[str, Any]:
    """:param there: parts that are there already
    :param empty: see `reading.blank`
    """
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_pretrained(
            str(location / "scheduler"), local_files_only=True
        ),
        **_tokenizers(location, options),
        **{name: _of_folder(name, location / name, dtype, empty) for name in _KINDS if name not in there},
    }


def _rest_of_file(
    location: Path, options: ModelOptions, dtype: torch.dtype, there: Collection[str], empty: bool
) -> dict[str, Any]:
    """As `_rest_of_folder`."""
    held = shapes_of(location)
    wanted = {name: place for name, place in _PARTS.items() if name not in there}
    prefix = next(key for key in held if key.endswith(_CHANNELS)).removesuffix(_CHANNELS)
    schedule = json.loads((CONFIG / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    if not any("guidance_in." in key for key in held):  # schnell
        schedule |= {"shift": 1.0, "use_dynamic_shifting": False}
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler.from_config(schedule),
        **_tokenizers(location, options),  # before what takes long
        "transformer": _transformer(location, prefix, dtype, empty),
        **{name: _of_file(name, location, prefix, dtype, empty) for name, (_, prefix) in wanted.items()},
    }


def _given_part(name: str, path: str, dtype: torch.dtype, empty: bool) -> nn.Module:
    """A text encoder or the VAE that an option names, a folder with a config.json or a file.

    :raises DeftError: when it cannot be read
    """
    option, location = f"--{_PARTS[name][0]}", Path(path)
    try:
        if location.is_file():
            return _of_file(name, location, "", dtype, empty)
        return _of_folder(name, location, dtype, empty)
    except DeftError as error:
        raise DeftError(f"{option}: {error}") from None
    except Exception as error:  # of many kinds
        raise DeftError(f"{option} {path}: not readable ({reason_of(error)})") from error


def _of_folder(name: str, folder: Path, dtype: torch.dtype, empty: bool) -> nn.Module:
    make = blank if empty else part_of_folder
    return make(_KINDS[name], folder, torch.float32 if name == "vae" else dtype)


def _of_file(name: str, file: Path, prefix: str, dtype: torch.dtype, empty: bool) -> nn.Module:
    """A part as it was published."""
    return _of_folder(name, CONFIG / name, dtype, True) if empty else _PART_FROM[name](file, prefix, dtype)


class _Tensors:
    """Those of a file, read one by one and cast, so that a model is not held twice nor in another precision."""

    def __init__(self, opened: Any, file: Path, prefix: str, dtype: torch.dtype):
        self.opened, self.file, self.prefix, self.dtype = opened, file, prefix, dtype
        self.names = {key.removeprefix(prefix) for key in opened.keys() if key.startswith(prefix)}

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.opened.get_slice(self.prefix + name).get_shape())

    def read(self, name: str, first: int = 0, behind: int | None = None) -> Tensor:
        """:param first: of the rows; those up to `behind`
        :raises DeftError: for numbers that are no values
        """
        tensor = self.opened.get_slice(self.prefix + name)[first:behind]
        if not tensor.is_floating_point():
            raise DeftError(
                f"{self.file}: {name} is quantised ({tensor.dtype}), which is not read; give one in bf16, fp16 or fp8"
            )
        layer = name.removesuffix(".weight")
        for scale in (f"{layer}.scale_weight", f"{layer}.weight_scale"):  # ComfyUI's scaled fp8
            if name.endswith(".weight") and scale in self.names:
                factor = self.opened.get_tensor(self.prefix + scale).float()
                if factor.numel() != 1:
                    raise DeftError(f"{self.file}: {scale} is no single number; give a file in bf16, fp16 or fp8")
                return (tensor.float() * factor).to(self.dtype)
        return tensor.to(self.dtype)

    def all(self, *roots: str) -> dict[str, Tensor]:
        """:param roots: with which names begin"""
        scales = (".scale_weight", ".weight_scale", ".scale_input", ".input_scale")
        return {
            name: self.read(name) for name in sorted(self.names) if name.startswith(roots) and not name.endswith(scales)
        }


@contextmanager
def _opened(file: Path, prefix: str, dtype: torch.dtype) -> Iterator[_Tensors]:
    shapes_of(file)  # tells what is wrong with it
    with safe_open(str(file), "pt") as opened:
        yield _Tensors(opened, file, prefix, dtype)


def _text_encoder(name: str, config: Any, roots: tuple[str, ...]) -> Callable[[Path, str, torch.dtype], nn.Module]:
    def read(file: Path, prefix: str, dtype: torch.dtype) -> nn.Module:
        with _opened(file, prefix, dtype) as tensors:
            state = tensors.all(*roots)
        model, found = _KINDS[name].from_pretrained(
            None,
            config=config.from_pretrained(str(CONFIG / name)),
            state_dict=state,
            dtype=dtype,
            output_loading_info=True,
        )
        return whole(model, file, found["missing_keys"])

    return read


def _vae(file: Path, prefix: str, dtype: torch.dtype) -> nn.Module:
    with _opened(file, prefix, torch.float32) as tensors:
        state = tensors.all("encoder.", "decoder.")
    model = AutoencoderKL.from_single_file(
        state, config=str(CONFIG / "vae"), dtype=torch.float32, local_files_only=True
    )
    return whole(model, file, [name for name, weight in model.named_parameters() if weight.is_meta])


_KINDS: dict[str, Any] = {"transformer": Transformer, "text_encoder": CLIPTextModel, "text_encoder_2": T5EncoderModel,
                          "vae": AutoencoderKL}  # fmt: skip
# by what the names of a text encoder's tensors begin; transformers 5 writes CLIP's without text_model.
_CLIP_ROOTS, _T5_ROOTS = ("text_model.", "embeddings.", "encoder.", "final_layer_norm."), ("encoder.", "shared.")
_PART_FROM = {
    "text_encoder": _text_encoder("text_encoder", CLIPTextConfig, _CLIP_ROOTS),
    "text_encoder_2": _text_encoder("text_encoder_2", T5Config, _T5_ROOTS),
    "vae": _vae,
}


def _transformer(file: Path, prefix: str, dtype: torch.dtype, empty: bool) -> nn.Module:
    """In black-forest-labs' layout; its sizes are those of the tensors."""
    with _opened(file, prefix, dtype) as tensors:
        config = json.loads((CONFIG / "transformer" / "config.json").read_text(encoding="utf-8"))
        width, channels = tensors.shape(_CHANNELS)
        blocks = {kind: {int(n) for name in tensors.names for n in re.findall(rf"^{kind}_blocks\.(\d+)\.", name)}
                  for kind in ("double", "single")}  # fmt: skip
        config |= {
            "num_layers": 1 + max(blocks["double"], default=-1),
            "num_single_layers": 1 + max(blocks["single"], default=-1),
            "in_channels": channels,
            "num_attention_heads": width // config["attention_head_dim"],
            "joint_attention_dim": tensors.shape("txt_in.weight")[1],
            "pooled_projection_dim": tensors.shape("vector_in.in_layer.weight")[1],
            "guidance_embeds": "guidance_in.in_layer.weight" in tensors.names,
        }
        if empty:
            return blank(Transformer, config, dtype)
        with init_empty_weights():
            transformer = Transformer.from_config(config)
        _, part = deft_architectures.recognise(transformer)
        state = {}
        for name, weight in transformer.named_parameters():
            path, kind = name.rsplit(".", 1)
            for pattern, replacement in (*part.renames, *_NOT_ADAPTED):
                path = re.sub(pattern, replacement, path)
            path, _, piece = path.partition("#")  # which part of a fused weight it is, or how it lies in it
            source = f"{path}.scale" if path.endswith("_norm") else f"{path}.{kind}"
            first = int(piece) * width if piece.isdigit() else 0
            if source in tensors.names:
                state[name] = tensors.read(source, first, first + len(weight))
        for name in ("norm_out.linear.weight", "norm_out.linear.bias"):  # scale and shift have changed places
            if name in state:
                state[name] = torch.cat(state[name].chunk(2)[::-1])
        found = transformer.load_state_dict(state, strict=False, assign=True)
    return whole(transformer, file, found.missing_keys)
