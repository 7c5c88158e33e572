"""The objective's options, each against sd-scripts' real trainers: with the same latents, random numbers and answers of
the model, its input, its timesteps and the loss have to be the same.

SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_objective.py -s
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor

from library.models.flux import Flux
from library.options.parse import parse
from library.options.rooms import ObjectiveOptions
from library.training import objective as ours
from library.training.objective import Diffusion, Objective
from library.training.randoms import Purpose
from tests.integration.conftest import needs_sd_scripts, run_script

pytestmark = needs_sd_scripts

PICTURES = 24
SIDE = Path(__file__).with_name("objective_side.py")

# what the model is -> sd-scripts' options for it, which belong to the model's room here
WORLDS = {
    "epsilon": "",
    "velocity": "--v_parameterization",
    "zero snr": "--v_parameterization --zero_terminal_snr",
    "flow": "",
}

# an option, and the model -> what is given to both
ROWS = {
    ("defaults", "epsilon"): "",
    ("defaults", "velocity"): "",
    ("defaults", "zero snr"): "",
    ("defaults", "flow"): "",
    ("min_snr_gamma", "epsilon"): "--min_snr_gamma 5",
    ("min_snr_gamma", "velocity"): "--min_snr_gamma 5",
    ("min_snr_gamma", "zero snr"): "--min_snr_gamma 5",
    ("min_snr_gamma at the end", "zero snr"): "--min_snr_gamma 5 --min_timestep 999 --max_timestep 999",
    ("scale_v_pred_loss_like_noise_pred", "velocity"): "--scale_v_pred_loss_like_noise_pred",
    ("scale_v_pred_loss_like_noise_pred at the end", "zero snr"):
        "--scale_v_pred_loss_like_noise_pred --min_timestep 999 --max_timestep 999",
    ("v_pred_like_loss", "epsilon"): "--v_pred_like_loss 0.5",
    ("debiased_estimation_loss", "epsilon"): "--debiased_estimation_loss",
    ("debiased_estimation_loss", "velocity"): "--debiased_estimation_loss",
    ("debiased_estimation_loss at the end", "zero snr"):
        "--debiased_estimation_loss --min_timestep 999 --max_timestep 999",
    ("all weights", "epsilon"): "--min_snr_gamma 2 --v_pred_like_loss 0.1 --debiased_estimation_loss",
    ("all weights at the start", "epsilon"):
        "--min_snr_gamma 2 --v_pred_like_loss 0.1 --debiased_estimation_loss --max_timestep 3",
    ("all weights", "velocity"):
        "--min_snr_gamma 2 --scale_v_pred_loss_like_noise_pred --debiased_estimation_loss",
    ("noise_offset", "epsilon"): "--noise_offset 0.1",
    ("noise_offset", "velocity"): "--noise_offset 0.1",
    ("noise_offset_random_strength", "epsilon"): "--noise_offset 0.1 --noise_offset_random_strength",
    ("adaptive_noise_scale", "epsilon"): "--noise_offset 0.1 --adaptive_noise_scale 0.5",
    ("adaptive_noise_scale below 0", "epsilon"): "--noise_offset 0.1 --adaptive_noise_scale=-2",
    ("multires_noise_iterations", "epsilon"): "--multires_noise_iterations 2",
    ("multires_noise_discount", "epsilon"): "--multires_noise_iterations 8 --multires_noise_discount 0.7",
    ("multires_noise_discount", "velocity"): "--multires_noise_iterations 8 --multires_noise_discount 0.7",
    ("ip_noise_gamma", "epsilon"): "--ip_noise_gamma 0.2",
    ("ip_noise_gamma", "velocity"): "--ip_noise_gamma 0.2",
    ("ip_noise_gamma", "flow"): "--ip_noise_gamma 0.2",
    ("ip_noise_gamma_random_strength", "epsilon"): "--ip_noise_gamma 0.2 --ip_noise_gamma_random_strength",
    ("ip_noise_gamma_random_strength", "flow"): "--ip_noise_gamma 0.2 --ip_noise_gamma_random_strength",
    ("all noise", "epsilon"):
        "--noise_offset 0.1 --noise_offset_random_strength --adaptive_noise_scale 0.1 --multires_noise_iterations 6 "
        "--ip_noise_gamma 0.2 --ip_noise_gamma_random_strength",
    ("min_timestep", "epsilon"): "--min_timestep 900",
    ("max_timestep", "epsilon"): "--max_timestep 100",
    ("min_timestep is max_timestep", "epsilon"): "--min_timestep 400 --max_timestep 400",
    ("loss_type l1", "epsilon"): "--loss_type l1",
    ("loss_type l1", "flow"): "--loss_type l1",
    ("loss_type huber", "epsilon"): "--loss_type huber",
    ("loss_type huber", "velocity"): "--loss_type huber --min_snr_gamma 5",
    ("loss_type huber at the end", "zero snr"): "--loss_type huber --min_timestep 999 --max_timestep 999",
    ("loss_type smooth_l1", "epsilon"): "--loss_type smooth_l1",
    ("huber_c", "epsilon"): "--loss_type huber --huber_c 0.3",
    ("huber_scale", "epsilon"): "--loss_type huber --huber_scale 2",  # without effect, in theirs too
    ("huber_scale constant", "epsilon"): "--loss_type huber --huber_schedule constant --huber_c 0.3 --huber_scale 2",
    ("huber_schedule constant", "flow"): "--loss_type huber --huber_schedule constant --huber_scale 2",
    ("huber_schedule exponential", "epsilon"): "--loss_type smooth_l1 --huber_schedule exponential --huber_scale 2",
    ("huber_schedule exponential", "flow"): "--loss_type smooth_l1 --huber_schedule exponential --huber_scale 2",
    ("timestep_sampling uniform", "flow"): "--timestep_sampling uniform",
    ("timestep_sampling sigmoid", "flow"): "--timestep_sampling sigmoid",
    ("timestep_sampling shift", "flow"): "--timestep_sampling shift --model_prediction_type raw",
    ("timestep_sampling flux_shift", "flow"): "--timestep_sampling flux_shift --model_prediction_type raw",
    ("sigmoid_scale", "flow"): "--timestep_sampling sigmoid --sigmoid_scale 0.5",
    ("sigmoid_scale shift", "flow"): "--timestep_sampling shift --sigmoid_scale 2",
    ("sigmoid_scale flux_shift", "flow"): "--timestep_sampling flux_shift --sigmoid_scale 2",
    ("discrete_flow_shift", "flow"): "--discrete_flow_shift 1.5",
    ("discrete_flow_shift shift", "flow"):
        "--timestep_sampling shift --discrete_flow_shift 3.1582 --model_prediction_type raw",
    ("model_prediction_type raw", "flow"): "--model_prediction_type raw",
    ("model_prediction_type additive", "flow"): "--model_prediction_type additive",
    ("weighting_scheme sigma_sqrt", "flow"): "--weighting_scheme sigma_sqrt",
    ("weighting_scheme cosmap", "flow"): "--weighting_scheme cosmap",
    ("weighting_scheme none", "flow"): "--weighting_scheme none",
    ("weighting_scheme logit_normal", "flow"): "--weighting_scheme logit_normal",
    ("logit_mean", "flow"): "--weighting_scheme logit_normal --logit_mean 0.5",
    ("logit_std", "flow"): "--weighting_scheme logit_normal --logit_std 0.5",
    ("weighting_scheme mode", "flow"): "--weighting_scheme mode",
    ("mode_scale", "flow"): "--weighting_scheme mode --mode_scale 0.8",
    ("weights of raw", "flow"): "--weighting_scheme sigma_sqrt --model_prediction_type raw",  # without effect
}  # fmt: skip


class Given:
    """Stands for `Randoms` of one picture: what sd-scripts has drawn, in its order."""

    def __init__(self, draws: list[tuple[str, Tensor]], options: ObjectiveOptions, flow: bool):
        self.of: dict[str, list[Tensor]] = {}
        for name, numbers in draws:
            self.of.setdefault(name, []).append(numbers)
        self.numbers = {Purpose.NOISE: self._next("randn_like")}
        if options.noise_offset and not flow:
            if options.noise_offset_random_strength:
                self.numbers[Purpose.OFFSET_STRENGTH] = self._next("rand")
            self.numbers[Purpose.OFFSET] = self._next("randn")
        if options.multires_noise_iterations and not flow:
            ratios = torch.stack(self.of.pop("random"))  # theirs stop where a side is 1
            self.numbers[Purpose.MULTIRES_RATIOS] = torch.ones(1, options.multires_noise_iterations).double()
            self.numbers[Purpose.MULTIRES_RATIOS][0, : len(ratios)] = ratios
            self.numbers[Purpose.MULTIRES] = torch.cat([part.flatten(1) for part in self.of.pop("randn")], 1)
        for name in ("randint", "normal", "randn", "rand"):  # the first that is left
            if name in self.of and Purpose.TIMESTEPS not in self.numbers:
                self.numbers[Purpose.TIMESTEPS] = self._next(name)
        if options.ip_noise_gamma:
            if options.ip_noise_gamma_random_strength:
                self.numbers[Purpose.PERTURBATION_STRENGTH] = self._next("rand")
            self.numbers[Purpose.PERTURBATION] = self._next("randn_like")
        assert not any(self.of.values()), "every number is used"

    def _next(self, name: str) -> Tensor:
        return self.of[name].pop(0)

    def _draw(self, purpose: Purpose, shape=()) -> Tensor:
        assert self.numbers[purpose].shape == (1, *shape)
        return self.numbers[purpose]

    normal = uniform = _draw

    def integers(self, purpose: Purpose, low: int, high: int) -> Tensor:
        if purpose not in self.numbers:
            assert high == low + 1  # where there is no choice, they draw nothing
            return torch.tensor([low])
        return self.numbers[purpose]

    def generators(self, purpose: Purpose) -> list[None]:
        return [None]

    def each(self) -> list[Given]:
        return [self]


def objective_of(options: ObjectiveOptions, world: str) -> Objective:
    if world == "flow":
        return ours.objective_of(options, Flux.__new__(Flux))  # whose kind decides what is not given
    prediction = "epsilon" if world == "epsilon" else "v_prediction"
    return Diffusion(
        options,
        DDPMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            prediction_type=prediction,
            rescale_betas_zero_snr=world == "zero snr",
        ),
    )


def options_of(row: str) -> ObjectiveOptions:
    needed = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o"]
    return parse([*needed, *row.split()]).objective


@pytest.fixture(scope="module")
def given() -> dict[str, Tensor]:
    generator, tensors = torch.Generator().manual_seed(0), {}
    for world in WORLDS:
        shape = (PICTURES, 16 if world == "flow" else 4, 16, 12)
        for part in ("latents", "answers"):
            tensors[f"{world}/{part}"] = torch.randn(shape, generator=generator) + 0.3
    return tensors


@pytest.fixture(scope="module")
def theirs(given, tmp_path_factory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("objective")
    save_file(given, folder / "given.safetensors")
    rows = {
        f"{name}, {world}": {"world": world, "options": [*row.split(), *WORLDS[world].split()]}
        for (name, world), row in ROWS.items()
    }
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    files = (folder / "rows.json", folder / "given.safetensors", folder / "found.safetensors")
    run_script(SIDE, *files, with_deft=False)
    return load_file(files[-1])


@pytest.mark.parametrize(("name", "world"), ROWS, ids=[", ".join(row) for row in ROWS])
def test_the_option_is_sd_scripts(name, world, given, theirs, monkeypatch):
    options = options_of(ROWS[name, world])
    objective, deviations = objective_of(options, world), []
    for i in range(PICTURES):
        prefix = f"{name}, {world}/{i}/"
        found = {key.removeprefix(prefix): value for key, value in theirs.items() if key.startswith(prefix)}
        draws = [(key.split()[1], found[key]) for key in sorted(found) if key[0].isdigit()]
        latents, answer = (given[f"{world}/{part}"][i : i + 1] for part in ("latents", "answers"))
        randoms = Given(draws, options, world == "flow")
        with monkeypatch.context() as patch:
            for density in ("normal", "rand"):  # diffusers' function draws by itself
                patch.setattr(torch, density, lambda randoms=randoms, **_: randoms.numbers[Purpose.TIMESTEPS])
            noised = objective.draw(randoms, latents)
        loss = objective.loss(noised, answer)
        assert found["loss"].isfinite()
        deviations.append(
            [
                float((noised.noisy - found["noisy"]).abs().max()),
                float((noised.timesteps - found["timesteps"]).abs().max()) / 1000,
                float((loss[0] - found["loss"]).abs() / found["loss"].abs()),
            ]
        )
    largest = torch.tensor(deviations, dtype=torch.float64).amax(0).tolist()
    print(
        f"--- {name}, {world}: "
        + ", ".join(f"{n} {d:.1e}" for n, d in zip(("input", "time", "loss"), largest, strict=True))
    )
    assert max(largest) < 1e-5


def test_every_option_has_a_row():
    defaults, tried = ObjectiveOptions(), set()
    for row in ROWS.values():
        options = options_of(row)
        tried |= {field.name for field in fields(options) if getattr(options, field.name) != field.default}
    assert tried == {field.name for field in fields(defaults)}
