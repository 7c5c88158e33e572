"""Configurations in the styles that people publish for sd-scripts, and a data set for them.

Each is written for these tests: after notebooks that write a config in sections and one for the data set, after
graphical front ends that write everything flat, after scripts that give a command line and a data set, and after what
sd-scripts' own docs/config_README explains. DATA stands for the folder that `make_data` fills.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from PIL import Image


@dataclass(frozen=True)
class Case:
    """A configuration: the file of options, that of data sets with its ending, and a command line."""

    config: str = ""
    dataset: str = ""
    arguments: tuple[str, ...] = ()
    ending: str = ".toml"
    script: str = "train_network"


MODEL = ("--pretrained_model_name_or_path", "DATA/model.safetensors", "--output_dir", "DATA/out")
CASES: dict[str, Case] = {
    "a notebook's sections": Case(
        config="""
[model_arguments]
v2 = false
v_parameterization = false
pretrained_model_name_or_path = "DATA/model.safetensors"
vae = "DATA/vae.safetensors"

[additional_network_arguments]
no_metadata = false
unet_lr = 1e-4
text_encoder_lr = 5e-5
network_dim = 32
network_alpha = 16
network_train_unet_only = false
network_train_text_encoder_only = false

[optimizer_arguments]
optimizer_type = "AdamW8bit"
learning_rate = 1e-4
max_grad_norm = 1.0
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 50
min_snr_gamma = 5.0

[dataset_arguments]
debug_dataset = false
train_data_dir = "DATA/train"
dataset_repeats = 1
shuffle_caption = true
keep_tokens = 1
caption_extension = ".txt"
resolution = "768,768"
caption_dropout_rate = 0.05
caption_tag_dropout_rate = 0.1
caption_dropout_every_n_epochs = 0
color_aug = false
token_warmup_min = 1
token_warmup_step = 0

[bucket_arguments]
enable_bucket = true
min_bucket_reso = 320
max_bucket_reso = 1280
bucket_reso_steps = 64
bucket_no_upscale = true

[training_arguments]
output_dir = "DATA/out"
output_name = "notebook"
save_precision = "fp16"
save_every_n_epochs = 1
train_batch_size = 4
max_token_length = 225
mem_eff_attn = false
xformers = true
max_train_epochs = 10
max_data_loader_n_workers = 8
persistent_data_loader_workers = true
gradient_checkpointing = false
gradient_accumulation_steps = 1
mixed_precision = "fp16"
clip_skip = 2
logging_dir = "DATA/logs"
log_prefix = "notebook"
lowram = true
noise_offset = 0.05

[saving_arguments]
save_model_as = "safetensors"
"""
    ),
    "a notebook's two files": Case(
        config="""
[additional_network_arguments]
unet_lr = 0.0005
text_encoder_lr = 0.0001
network_dim = 16
network_alpha = 8

[optimizer_arguments]
learning_rate = 0.0005
lr_scheduler = "cosine_with_restarts"
lr_scheduler_num_cycles = 3
lr_warmup_steps = 0.05
optimizer_type = "AdamW8bit"
optimizer_args = [ "weight_decay=0.1", "betas=[0.9,0.99]",]

[training_arguments]
pretrained_model_name_or_path = "DATA/model.safetensors"
max_train_epochs = 10
train_batch_size = 2
seed = 42
max_token_length = 225
lowram = true
max_data_loader_n_workers = 8
persistent_data_loader_workers = true
save_precision = "fp16"
mixed_precision = "fp16"
output_dir = "DATA/out"
logging_dir = "DATA/logs"
output_name = "two files"
log_prefix = "two files"
save_every_n_epochs = 1
save_last_n_epochs = 10
min_snr_gamma = 5.0
prior_loss_weight = 1.0
cache_latents = true

[dreambooth_arguments]
prior_loss_weight = 1.0
""",
        dataset="""
[general]
resolution = 512
shuffle_caption = true
keep_tokens = 1
flip_aug = false
caption_extension = ".txt"
enable_bucket = true
bucket_no_upscale = false
bucket_reso_steps = 64
min_bucket_reso = 256
max_bucket_reso = 1024

[[datasets]]

[[datasets.subsets]]
num_repeats = 10
image_dir = "DATA/cats"
""",
    ),
    "a front end for FLUX": Case(
        dataset="""
[general]
shuffle_caption = false
caption_extension = '.txt'
keep_tokens = 1

[[datasets]]
resolution = 512
batch_size = 1
keep_tokens = 1

  [[datasets.subsets]]
  image_dir = 'DATA/cats'
  class_tokens = 'sks cat'
  num_repeats = 10
""",
        arguments=(
            *MODEL, "--clip_l", "DATA/clip_l.safetensors", "--t5xxl", "DATA/t5xxl.safetensors", "--ae",
            "DATA/ae.safetensors", "--cache_latents_to_disk", "--save_model_as", "safetensors", "--sdpa",
            "--persistent_data_loader_workers", "--max_data_loader_n_workers", "2", "--seed", "42",
            "--gradient_checkpointing", "--mixed_precision", "bf16", "--save_precision", "bf16", "--network_dim", "4",
            "--optimizer_type", "adafactor", "--optimizer_args", "relative_step=False", "scale_parameter=False",
            "warmup_init=False", "--lr_scheduler", "constant_with_warmup", "--max_grad_norm", "0.0",
            "--learning_rate", "8e-4", "--network_train_unet_only", "--cache_text_encoder_outputs",
            "--cache_text_encoder_outputs_to_disk", "--fp8_base", "--highvram", "--max_train_epochs", "16",
            "--save_every_n_epochs", "4", "--output_name", "flux", "--timestep_sampling", "shift",
            "--discrete_flow_shift", "3.1582", "--model_prediction_type", "raw", "--guidance_scale", "1",
            "--loss_type", "l2",
        ),
        script="flux_train_network",
    ),
    "a front end's flat file": Case(
        config="""
pretrained_model_name_or_path = "DATA/model.safetensors"
output_dir = "DATA/out"
output_name = "flat"
mixed_precision = "bf16"
full_bf16 = true
save_precision = "bf16"
gradient_checkpointing = true
gradient_accumulation_steps = 2
seed = 23
max_token_length = 225
prior_loss_weight = 1.0
sdpa = true
max_train_steps = 2500
cache_latents = true
cache_latents_to_disk = true
vae_batch_size = 4
lr_scheduler = "cosine"
lr_warmup_steps = 125
optimizer_type = "Prodigy"
optimizer_args = ["weight_decay=0.01", "decouple=True", "d_coef=0.8", "use_bias_correction=True"]
learning_rate = 1.0
unet_lr = 1.0
text_encoder_lr = [1.0, 0.5]
network_dim = 8
network_alpha = 4.0
network_dropout = 0.1
scale_weight_norms = 1.0
multires_noise_iterations = 6
multires_noise_discount = 0.3
ip_noise_gamma = 0.1
huber_schedule = "snr"
huber_c = 0.1
loss_type = "huber"
no_half_vae = true
save_every_n_steps = 500
save_last_n_steps = 1000
save_state = false
sample_every_n_epochs = 1
sample_sampler = "euler_a"
sample_prompts = "DATA/prompts.txt"
logging_dir = "DATA/logs"
""",
        dataset="""
[general]
batch_size = 2
resolution = [1024, 1024]
enable_bucket = true
bucket_no_upscale = true
min_bucket_reso = 256
max_bucket_reso = 2048
bucket_reso_steps = 32

[[datasets]]

[[datasets.subsets]]
image_dir = "DATA/cats"
num_repeats = 4
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 2
flip_aug = true

[[datasets.subsets]]
image_dir = "DATA/dogs"
num_repeats = 1
caption_extension = "caption"
caption_dropout_rate = 0.1
""",
        script="sdxl_train_network",
    ),
    "two methods in one file": Case(
        dataset="""
[general]
shuffle_caption = true
caption_extension = '.txt'
keep_tokens = 1

[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 2

  [[datasets.subsets]]
  image_dir = 'DATA/cats'
  class_tokens = 'sks cat'

  [[datasets.subsets]]
  image_dir = 'DATA/dogs'
  class_tokens = 'sks dog'
  keep_tokens = 3

[[datasets]]
resolution = [768, 768]
batch_size = 2

  [[datasets.subsets]]
  image_dir = 'DATA/cats'
  metadata_file = 'DATA/meta.json'
""",
        arguments=MODEL,
    ),
    "separators and wildcards": Case(
        dataset="""
[general]
flip_aug = true
color_aug = false
resolution = [1024, 1024]

[[datasets]]
batch_size = 6
enable_bucket = true
bucket_no_upscale = true
caption_extension = ".txt"
keep_tokens_separator = "|||"
shuffle_caption = true
caption_tag_dropout_rate = 0.1
secondary_separator = ";;;"
enable_wildcard = true

  [[datasets.subsets]]
  image_dir = "DATA/cats"
  num_repeats = 1
  caption_prefix = "1girl, someone |||"
  caption_suffix = ", screencap ||| rating: general"
""",
        arguments=MODEL,
    ),
    "captions in one file, by options": Case(
        config="""
[dataset_arguments]
in_json = "DATA/meta.json"
train_data_dir = "DATA/cats"
dataset_repeats = 7
shuffle_caption = true
keep_tokens = 2
resolution = "640,512"
caption_dropout_rate = 0.1
token_warmup_min = 2
token_warmup_step = 0.5
train_batch_size = 3
""",
        arguments=MODEL,
    ),
    "captions in files, by data sets": Case(
        dataset="""
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 1
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 1000
bucket_reso_steps = 64
bucket_no_upscale = false

  [[datasets.subsets]]
  image_dir = 'DATA/cats'
  num_repeats = 10
  metadata_file = 'DATA/meta.json'

  [[datasets.subsets]]
  image_dir = 'DATA/dogs'
  metadata_file = 'DATA/meta.jsonl'
  caption_dropout_every_n_epochs = 3
  alpha_mask = true
""",
        arguments=(*MODEL, "--dataset_repeats", "5"),
    ),
    "masks in a folder": Case(
        dataset="""
[[datasets]]
resolution = 512
batch_size = 4
keep_tokens = 1
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 1024
bucket_reso_steps = 64
bucket_no_upscale = true

  [[datasets.subsets]]
  image_dir = 'DATA/cats'
  num_repeats = 10
  caption_extension = '.txt'
  conditioning_data_dir = 'DATA/masks'
""",
        arguments=(*MODEL, "--masked_loss"),
    ),
    "masks in the pictures": Case(
        config="alpha_mask = true\nrandom_crop = true\nenable_bucket = true\ntrain_data_dir = 'DATA/train'\n"
        "resolution = '512'\ncaption_extension = '.txt'\nface_crop_aug_range = '1.5,3.0'\n",
        arguments=MODEL,
    ),
    "JSON": Case(
        dataset=json.dumps(
            {
                "general": {"enable_bucket": True, "caption_extension": ".txt", "num_repeats": 3},
                "datasets": [
                    {"resolution": 512, "subsets": [{"image_dir": "DATA/cats"}]},
                    {"resolution": [768, 512], "subsets": [{"image_dir": "DATA/cats", "num_repeats": 1}]},
                ],
            }
        ),
        arguments=(*MODEL, "--train_batch_size", "2", "--shuffle_caption"),
        ending=".json",
    ),
    "regularisation pictures": Case(
        arguments=(
            *MODEL, "--train_data_dir", "DATA/train", "--reg_data_dir", "DATA/reg", "--prior_loss_weight", "0.5",
            "--resolution", "512,768", "--caption_extension", ".caption", "--enable_bucket", "--flip_aug",
            "--caption_separator", ";", "--resize_interpolation", "bicubic",
        ),
    ),
    "regularisation in a file": Case(
        dataset="""
[general]
enable_bucket = true
caption_extension = ".txt"

[[datasets]]
resolution = 512
batch_size = 2

  [[datasets.subsets]]
  image_dir = "DATA/cats"
  class_tokens = "sks cat"
  num_repeats = 2

  [[datasets.subsets]]
  is_reg = true
  image_dir = "DATA/dogs"
  class_tokens = "cat"
""",
        arguments=(*MODEL, "--prior_loss_weight", "0.3"),
    ),
    "three sizes": Case(
        dataset="""
[general]
flip_aug = true
color_aug = false
keep_tokens_separator= "|||"
shuffle_caption = false
caption_tag_dropout_rate = 0
caption_extension = ".txt"
min_bucket_reso = 64
max_bucket_reso = 2048

[[datasets]]
batch_size = 1
enable_bucket = true
resolution = [1024, 1024]

  [[datasets.subsets]]
  image_dir = "DATA/cats"
  num_repeats = 10

[[datasets]]
batch_size = 1
enable_bucket = true
resolution = [768, 768]

  [[datasets.subsets]]
  image_dir = "DATA/cats"
  num_repeats = 10

[[datasets]]
batch_size = 1
enable_bucket = true
resolution = [512, 512]

  [[datasets.subsets]]
  image_dir = "DATA/cats"
  num_repeats = 10
""",
        arguments=MODEL,
    ),
    "everything of a subset": Case(
        dataset="""
[general]
custom_attributes = { kind = "all" }
resize_interpolation = "area"
class_tokens = "thing"
caption_dropout_rate = 1
network_multiplier = 0.5

[[datasets]]
resolution = 512
validation_split = 0.5
validation_seed = 3
resize_interpolation = "lanczos"
num_repeats = 4

  [[datasets.subsets]]
  image_dir = "DATA/cats"
  custom_attributes = { kind = "cat", diff_output_preservation = true }
  face_crop_aug_range = [1.0, 3.0]
  random_crop = true
  color_aug = true
  token_warmup_min = 3
  token_warmup_step = 100
  caption_separator = ";"
  alpha_mask = true

  [[datasets.subsets]]
  image_dir = "DATA/dogs"
  resize_interpolation = "box"
  caption_prefix = "a"
  caption_suffix = "b"
  cache_info = false
  is_reg = true

  [[datasets.subsets]]
  image_dir = "DATA/cats"
  num_repeats = 9

  [[datasets.subsets]]
  image_dir = "DATA/train/3_sks dog"
  num_repeats = 0
""",
        arguments=(*MODEL, "--caption_extention", "txt"),
    ),
}  # fmt: skip
# which v0.11.1 alone knows
NEW_CASES = {
    "small pictures left out": Case(
        dataset="[general]\nresolution = 512\nskip_image_resolution = [64, 32]\ncaption_extension = '.txt'\n"
        "[[datasets]]\n[[datasets.subsets]]\nimage_dir = 'DATA/cats'\n"
        "[[datasets]]\nskip_image_resolution = 8\n[[datasets.subsets]]\nimage_dir = 'DATA/dogs'\n",
        arguments=MODEL,
    ),
    "small pictures left out by an option": Case(
        arguments=(*MODEL, "--train_data_dir", "DATA/train", "--skip_image_resolution", "8,4", "--resolution", "512",
                   "--caption_extension", ".txt"),
    ),
}  # fmt: skip


def make_data(folder: Path) -> Path:
    """The folder's pictures, captions, masks and metadata."""
    for name in ("cats", "dogs", "masks", "train/3_sks cat", "train/3_sks dog", "train/no repeats", "reg/2_cat"):
        (folder / name).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (96, 64), (80 * i, 9, 9)).save(folder / name / f"{i}.png")
            for ending in (".txt", ".caption"):
                (folder / name / f"{i}{ending}").write_text("one, two, three\n")
    meta = {f"{i}.png": {"caption": "a cat", "tags": "one, two", "image_size": [96, 64]} for i in range(2)}
    (folder / "meta.json").write_text(json.dumps(meta))
    lines = [{"image_path": name, "caption": "a dog", "image_size": [96, 64]} for name in meta]
    (folder / "meta.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def written(case: Case, data: Path, folder: Path) -> list[str]:
    """Writes the case's files; returns its command line."""
    arguments = [word.replace("DATA", data.as_posix()) for word in case.arguments]
    for option, text, ending in (("config_file", case.config, ".toml"), ("dataset_config", case.dataset, case.ending)):
        if text:
            file = folder / f"{option}{ending}"
            file.write_text(text.replace("DATA", data.as_posix()), encoding="utf-8")
            arguments += [f"--{option}", str(file)]
    return arguments
