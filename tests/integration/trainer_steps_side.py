"""One side of test_trainer_steps.py: `make|single|ours|theirs|flux FOLDER [NAME TRAINER OPTION...]`.

`theirs` and `flux` run in sd-scripts' own Python and folder, `make` and `ours` in ours. Both trainers train with their
own `train`; what a step sees is put in from FOLDER/given.safetensors: latents, caption, sizes, noise and timestep.
FOLDER/NAME.json has the losses, the seconds and the peak of memory; the adapter is FOLDER/NAME.safetensors.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

STEPS, SIDE, T5_LAYERS = 10, 16, 1
CAPTIONS = ("sks thing 0", "a red car by the sea", "", "two old men, one hat")


def write_given(file: Path, channels: int) -> None:
    """Ten steps of batch 1, on four latents."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    sizes = [[512.0, 768.0, 0.0, 64.0, 512.0, 640.0], [1500.0, 1000.0, 13.0, 250.0, 1024.0, 960.0]]
    save_file(
        {
            "latents": normal(4, channels, SIDE, SIDE),
            "sizes": torch.tensor(sizes * 2),
            "noise": normal(STEPS, 1, channels, SIDE, SIDE),
            "timesteps": torch.randint(0, 1000, (STEPS, 1), generator=generator),
            "normal": normal(STEPS, 1),  # which FLUX's timesteps are made of
        },
        file,
    )


class Given:
    """What a step sees."""

    def __init__(self, folder: Path):
        self.of = load_file(folder / "given.safetensors")
        self.losses: list[float] = []

    @property
    def step(self) -> int:
        return len(self.losses)

    def picture(self, step: int) -> tuple[Tensor, str, Tensor]:
        """Latents (1, c, h, w), caption, sizes (1, 6)."""
        i = step % len(CAPTIONS)
        return self.of["latents"][i : i + 1].clone(), CAPTIONS[i], self.of["sizes"][i : i + 1].clone()

    def numbers(self, name: str, step: int) -> Tensor:
        return self.of[name][step].clone()


# --- theirs -----------------------------------------------------------------------------------------------------------


def theirs(given: Given, trainer: str, argv: list[str]) -> None:
    from library import train_util

    module = importlib.import_module(trainer)
    kind = next(value for name, value in vars(module).items() if name.endswith("NetworkTrainer"))
    own, randn_like, randn = kind.process_batch, torch.randn_like, torch.randn

    def process_batch(self: Any, batch: dict, *rest: Any, **options: Any) -> Tensor:
        latents, caption, sizes = given.picture(given.step)
        tokenizing = rest[-1]
        batch |= {"latents": latents, "captions": [caption], "input_ids_list": tokenizing.tokenize([caption])}
        names = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
        batch |= dict(zip(names, sizes.split(2, 1), strict=True))

        def noise(like: Tensor, **_: Any) -> Tensor:
            assert like.shape == latents.shape
            return given.numbers("noise", given.step)

        def normal(*shape: Any, **_: Any) -> Tensor:
            assert shape in (((1,),), (1,))
            return given.numbers("normal", given.step)

        def timesteps(*_: Any) -> Tensor:
            return given.numbers("timesteps", given.step)

        with (
            mock.patch.object(torch, "randn_like", noise),
            mock.patch.object(torch, "randn", normal),
            mock.patch.object(train_util, "get_timesteps", timesteps),
        ):
            loss = own(self, batch, *rest, **options)
        given.losses.append(float(loss))
        return loss

    with (
        mock.patch.object(kind, "process_batch", process_batch),
        mock.patch.object(kind, "shift_scale_latents", lambda _, __, latents: latents),  # ours are scaled already
        short_t5_of_theirs(),
    ):
        parser = module.setup_parser()
        args = parser.parse_args(argv)
        train_util.verify_command_line_training_args(args)
        kind().train(args)
    assert (torch.randn_like, torch.randn) == (randn_like, randn)


@contextlib.contextmanager
def short_t5_of_theirs() -> Iterator[None]:
    """FLUX.1's text encoders as ours. sd-scripts has T5's number of layers written in its code, and differs in two ways
    that have nothing to do with training: --gradient_checkpointing leaves T5's dropout on, though it is frozen, and
    CLIP-L has GELU, since `hidden_act` stands twice in `load_clip_l`, where its published configuration has quick GELU.
    """
    from library import flux_utils

    t5, clip = flux_utils.T5Config, flux_utils.CLIPConfig
    with (
        mock.patch.object(
            flux_utils, "T5Config", lambda **fields: t5(**fields | {"num_layers": T5_LAYERS, "dropout_rate": 0.0})
        ),
        mock.patch.object(flux_utils, "CLIPConfig", lambda **fields: clip(**fields | {"hidden_act": "quick_gelu"})),
    ):
        yield


def make_flux(folder: Path) -> None:
    """FLUX.1 dev of real widths with one double and two single blocks; T5-XXL of one layer."""
    import sd_scripts_side

    sd_scripts_side.make_flux(folder, (1, 2), T5_LAYERS)
    file = folder / "flux.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("norm.scale"):  # of queries and keys
            tensor.uniform_(0.5, 1.5)
    save_file(tensors, file)
    end_texts(folder / "tokenizers" / "google_t5-v1_1-xxl" / "tokenizer.json")


def end_texts(file: Path) -> None:
    """As T5's real tokenizer does, and transformers 5 by itself, whatever the file says."""
    from tokenizers import Tokenizer, processors

    found = Tokenizer.from_file(str(file))
    found.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    found.save(str(file))


# --- ours -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def short_t5_of_ours() -> Iterator[None]:
    from transformers import T5Config

    from library.models import reading

    own = T5Config.from_pretrained.__func__

    def short(cls: Any, *places: Any, **options: Any) -> Any:
        return own(cls, *places, **options | {"num_layers": T5_LAYERS})

    with (
        mock.patch.object(T5Config, "from_pretrained", classmethod(short)),
        mock.patch.object(reading, "check_tokenizer"),  # that of sd_scripts_side.py has few words
    ):
        yield


def ours(given: Given, argv: list[str]) -> None:
    import train_network_deft
    from library.data.batches import Batch
    from library.training.losses import Losses
    from library.training.randoms import Purpose, Randoms

    own = Losses.__call__

    def losses(self: Losses, batch: Batch, randoms: Randoms, **more: Any) -> Tensor:
        latents, caption, sizes = given.picture(randoms.step)
        loss = own(self, Batch(latents, [caption], sizes), randoms, **more)
        if torch.is_grad_enabled():  # the meters ask too
            assert randoms.step == given.step
            given.losses.append(float(loss.mean()))
        return loss

    def normal(self: Randoms, purpose: Purpose, shape: Any = ()) -> Tensor:
        name = {Purpose.NOISE: "noise", Purpose.TIMESTEPS: "normal"}[purpose]
        return given.numbers(name, self.step).view(1, *shape)

    with (
        mock.patch.object(Losses, "__call__", losses),
        mock.patch.object(Randoms, "normal", normal),
        mock.patch.object(Randoms, "integers", lambda self, *_: given.numbers("timesteps", self.step)),
        short_t5_of_ours(),
    ):
        assert train_network_deft.main(argv) == 0


def make_adapter(folder: Path, argv: list[str]) -> None:
    """An adapter none of whose numbers are 0, and what the steps see."""
    from library.models.loading import load
    from library.options.parse import parse
    from networks import deft

    run = parse(argv)
    with short_t5_of_ours():
        model = load(run.model)
    encoders = [] if run.network.network_train_unet_only else model.text_encoders
    torch.manual_seed(3)
    network = deft.create_network(1.0, 4, 2, None, encoders, model.denoiser, **run.network.network_args)
    network.apply_to(encoders, model.denoiser, bool(encoders))  # it holds no parameters before
    with torch.no_grad():
        for parameter in network.parameters():
            size = 0.3 * parameter.std() if parameter.numel() > 1 and parameter.any() else torch.tensor(0.02)
            parameter += size * torch.randn_like(parameter)
    parameters = list(network.parameters())
    assert parameters
    assert all(parameter.any() for parameter in parameters)
    network.save_weights(str(folder / "adapter.safetensors"), torch.float32, None)
    write_given(folder / "given.safetensors", model.vae.config.latent_channels)


def write_single_file(folder: Path, file: Path) -> None:
    """A Diffusers folder as a checkpoint in the original's layout, in its own precision."""
    from diffusers import DiffusionPipeline

    from tests import small_models

    pipeline = DiffusionPipeline.from_pretrained(str(folder), torch_dtype="auto", local_files_only=True)
    if hasattr(pipeline, "text_encoder_2"):
        # sd-scripts reads the projection of a single file as it stands, diffusers turns it: one that is the same both
        # ways makes both read the same model
        weight = pipeline.text_encoder_2.text_projection.weight
        weight.data = (weight.data + weight.data.T) / 2
    save_file(small_models.single_file(pipeline), file)


def main(what: str, folder: Path, name: str, *rest: str) -> None:
    given, start = Given(folder) if what in ("ours", "theirs") else None, time.monotonic()
    if given is None:
        {"flux": lambda: make_flux(folder), "make": lambda: make_adapter(folder, list(rest)),
         "single": lambda: write_single_file(folder, Path(name))}[what]()  # fmt: skip
        return
    trainer, *argv = rest
    argv += ["--output_dir", str(folder), "--output_name", name]
    theirs(given, trainer, argv) if what == "theirs" else ours(given, argv)
    found = {"losses": given.losses, "seconds": round(time.monotonic() - start),
             "GiB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
