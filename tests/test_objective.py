"""The objective: against float64 formulas, diffusers, and what has to be so."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler

from library.models.family import Family
from library.options.parse import parse
from library.options.rooms import ObjectiveOptions
from library.training.objective import DIFFUSION_ONLY, FLOW_ONLY, Diffusion, Flow, objective_of
from library.training.randoms import Randoms
from library.training.validation import validated
from networks.deft_config import DeftError

SD_SCRIPTS = {"timestep_sampling": Family.timestep_sampling, "model_prediction_type": Family.model_prediction_type}
RAW = {"model_prediction_type": "raw"}
EVERY_NOISE = {
    "noise_offset": 0.1, "noise_offset_random_strength": True, "adaptive_noise_scale": 0.2,
    "multires_noise_iterations": 6, "ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True,
}  # fmt: skip


def scheduler(prediction: str = "epsilon", zero_snr: bool = False) -> DDPMScheduler:
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         prediction_type=prediction, rescale_betas_zero_snr=zero_snr)  # fmt: skip


def diffusion(prediction: str = "epsilon", zero_snr: bool = False, **options) -> Diffusion:
    return Diffusion(ObjectiveOptions(**options), scheduler(prediction, zero_snr))


def flow(**options) -> Flow:
    return Flow(ObjectiveOptions(**(SD_SCRIPTS | options)))


def alphas() -> np.ndarray:
    """Of Stable Diffusion's noise schedule, in float64."""
    return np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def draw(objective, pictures=range(4), size=(4, 16, 12), step=0, latents=None):
    latents = torch.randn(64, *size, generator=torch.Generator().manual_seed(1)) if latents is None else latents
    return objective.draw(Randoms(3, step, pictures), latents[list(pictures)])


OBJECTIVES = {
    "epsilon": lambda: diffusion(min_snr_gamma=5.0, **EVERY_NOISE),
    "velocity": lambda: diffusion("v_prediction", debiased_estimation_loss=True, **EVERY_NOISE),
    "huber": lambda: diffusion(loss_type="huber", **EVERY_NOISE),
    "sigma": lambda: flow(ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True),
    "logit_normal": lambda: flow(weighting_scheme="logit_normal"),
    "flux_shift": lambda: flow(timestep_sampling="flux_shift", loss_type="huber", huber_schedule="exponential"),
    "uniform": lambda: flow(timestep_sampling="uniform", weighting_scheme="cosmap"),
}


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_a_batch_of_four_is_two_of_two(objective):
    """Inputs and losses: neither normalises over the batch."""
    four, halves = draw(objective()), [draw(objective(), [0, 1]), draw(objective(), [2, 3])]
    for name in ("noisy", "timesteps", "target", "weights", "thresholds"):
        if getattr(four, name) is not None:
            torch.testing.assert_close(
                getattr(four, name), torch.cat([getattr(half, name) for half in halves]), rtol=1e-6, atol=1e-6
            )
    prediction = torch.randn(4, 4, 16, 12)
    losses = [objective().loss(half, part) for half, part in zip(halves, prediction.split(2), strict=True)]
    torch.testing.assert_close(objective().loss(four, prediction), torch.cat(losses), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES.keys())
def test_shapes_types_and_finite_gradients(objective):
    noised, prediction = draw(objective()), torch.randn(4, 4, 16, 12, dtype=torch.bfloat16, requires_grad=True)
    loss = objective().loss(noised, prediction)
    loss.mean().backward()
    assert loss.shape == noised.timesteps.shape == noised.weights.shape == (4,)
    assert noised.noisy.shape == noised.target.shape == (4, 4, 16, 12)
    for tensor in (noised.noisy, noised.target, noised.weights, loss):
        assert tensor.dtype == torch.float32
    assert noised.timesteps.dtype == (torch.int64 if isinstance(objective(), Diffusion) else torch.float32)
    assert prediction.grad.isfinite().all()
    assert prediction.grad.abs().amax((1, 2, 3)).min() > 0


@pytest.mark.parametrize("option", EVERY_NOISE, ids=str)
def test_an_options_draws_move_no_others(option):
    """The timesteps stay, and what an option adds is the same with every other option beside it or not."""
    without = {name: value for name, value in EVERY_NOISE.items() if name != option}
    if option == "noise_offset":
        without |= {"adaptive_noise_scale": None}
    every, fewer = draw(diffusion(**EVERY_NOISE)), draw(diffusion(**without))
    assert torch.equal(every.timesteps, fewer.timesteps)
    assert not torch.equal(every.noisy, fewer.noisy)
    perturbation_alone = option.startswith("ip_noise")
    assert torch.equal(every.target, fewer.target) == perturbation_alone  # which the target does not have


@pytest.mark.parametrize("option", ["noise_offset_random_strength", "ip_noise_gamma_random_strength"])
def test_random_strengths_are_each_pictures_own_and_below_the_option(option):
    name = option.removesuffix("_random_strength")
    size, part = (4, 2, 2), "target" if name == "noise_offset" else "noisy"
    plain, strong, weak = (
        getattr(draw(diffusion(**given, min_timestep=999), range(64), size), part)
        for given in ({}, {name: 0.5}, {name: 0.5, option: True})
    )
    shares = ((weak - plain) / (strong - plain)).flatten(1).median(1).values
    assert shares.min() >= 0
    assert shares.max() <= 1
    assert float(shares.mean()) == pytest.approx(0.5, abs=0.12)
    assert shares.std() > 0.2


def test_noise_offset_shifts_channels():
    plain, shifted = draw(diffusion(), range(64)), draw(diffusion(noise_offset=0.3), range(64))
    offsets = shifted.target - plain.target
    torch.testing.assert_close(offsets, offsets[..., :1, :1].expand_as(offsets), rtol=0, atol=1e-6)
    assert float(offsets[..., 0, 0].std()) == pytest.approx(0.3, rel=0.15)


def test_adaptive_noise_scale_adds_the_channels_mean():
    latents = torch.tensor([2.0, -1.0]).view(1, 2, 1, 1).expand(8, 2, 4, 4)
    plain, fixed, more, less = (
        draw(diffusion(**given), range(8), latents=latents).target
        for given in ({}, {"noise_offset": 0.1}, {"noise_offset": 0.1, "adaptive_noise_scale": 0.05},
                      {"noise_offset": 0.1, "adaptive_noise_scale": -0.08})
    )  # fmt: skip
    for found, factors in ((more, [2.0, 1.5]), (less, [0.0, 0.2])):  # 0.1 + 0.05 * 2; 0.1 - 0.08 * 2 is below 0
        expected = plain + (fixed - plain) * torch.tensor(factors).view(1, 2, 1, 1)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_multires_noise_is_smoother_at_a_standard_deviation_of_1():
    def roughness(noise):
        return float((noise[..., 1:] - noise[..., :-1]).square().mean()) / float(noise.square().mean())

    def noise(**given):
        return draw(diffusion(**given), range(64), (4, 32, 24)).target

    weak, strong = (noise(multires_noise_iterations=6, multires_noise_discount=discount) for discount in (0.3, 0.9))
    assert roughness(noise()) == pytest.approx(2, rel=0.02)  # white
    assert 1.98 > roughness(weak) > 1.9 > roughness(strong)
    for made in (weak, strong):
        torch.testing.assert_close(made.flatten(1).std(1), torch.ones(64), rtol=0, atol=1e-5)
    # the first of them is not coarser: once is twice as much white noise
    assert roughness(noise(multires_noise_iterations=1)) == pytest.approx(roughness(noise()), rel=0.05)


def test_perturbed_input_has_more_variance():
    """(1 + gamma^2) of the noise's, arXiv 2301.11706."""
    plain, perturbed = (
        draw(diffusion(ip_noise_gamma=gamma, min_timestep=999), range(64), latents=torch.zeros(64, 4, 16, 16)).noisy
        for gamma in (None, 0.5)
    )
    assert float(perturbed.var() / plain.var()) == pytest.approx(1.25, rel=0.03)


# --- prediction, target, timesteps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_loss_is_zero_for_the_right_prediction_at_every_timestep(prediction):
    """From latents alone: a model that knows the picture answers with what the schedule says."""
    latents, timesteps = torch.randn(1000, 4, 2, 2), torch.arange(1000)
    for zero_snr in {False, prediction == "v_prediction"}:
        objective = diffusion(prediction, zero_snr)
        noised = objective.draw(Randoms(0, 0, range(1000)), latents, timesteps)
        a = objective.scheduler.alphas_cumprod.double()[timesteps].sqrt().view(-1, 1, 1, 1)
        b = (1 - a**2).sqrt()
        noise = (noised.noisy - a * latents) / b
        answer = noise if prediction == "epsilon" else a * noise - b * latents
        assert objective.loss(noised, answer).max() < 1e-5
        assert objective.loss(noised, answer + 1).min() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", ["raw", "additive", "sigma_scaled"])
def test_loss_is_zero_for_the_right_flow(kind):
    objective, latents = flow(model_prediction_type=kind, timestep_sampling="uniform"), torch.randn(64, 4, 2, 2)
    noised = objective.draw(Randoms(0, 0, range(64)), latents)
    sigmas = (noised.timesteps / 1000).view(-1, 1, 1, 1)
    flows = (noised.noisy - latents) / sigmas  # from the picture to the noise
    answer = {"raw": flows, "additive": flows - noised.noisy, "sigma_scaled": (noised.noisy - flows) / sigmas}[kind]
    seen = noised.timesteps > 10
    assert objective.loss(noised, answer)[seen].max() < 1e-5


@pytest.mark.parametrize(
    ("given", "lowest", "highest"),
    [({}, 0, 999), ({"min_timestep": 200, "max_timestep": 300}, 200, 299), ({"max_timestep": 1}, 0, 0),
     ({"min_timestep": 999, "max_timestep": 999}, 999, 999)],
)  # fmt: skip
def test_timesteps_are_spread_evenly_within_the_bounds(given, lowest, highest):
    timesteps = draw(diffusion(**given), range(4096), latents=torch.zeros(4096, 1, 1, 1)).timesteps.double()
    assert lowest <= timesteps.min() <= lowest + (highest - lowest) * 0.01
    assert highest >= timesteps.max() >= highest - (highest - lowest) * 0.01
    assert float(timesteps.mean()) == pytest.approx((lowest + highest) / 2, abs=0.02 * (highest - lowest))


def test_validation_timesteps():
    """sd-scripts' four between the bounds."""
    assert validated(diffusion()) == [200, 400, 600, 800]
    assert validated(diffusion(min_timestep=500)) == [600, 700, 800, 900]
    assert validated(flow()) == [200, 400, 600, 800]
    for objective in (diffusion(**EVERY_NOISE), flow()):
        drawn = objective.draw(Randoms(0, 0, [0, 1]), torch.randn(2, 4, 8, 8), torch.tensor([200, 800]))
        assert drawn.timesteps.tolist() == [200, 800]


def quantiles(**given) -> np.ndarray:
    """10%, 50% and 90% of sigma."""
    timesteps = draw(flow(**given), range(4096), latents=torch.zeros(4096, 1, 32, 64)).timesteps
    assert timesteps.min() >= 0
    assert timesteps.max() <= 1000
    return np.quantile(timesteps.double() / 1000, [0.1, 0.5, 0.9])


Z = np.array([-1.2815516, 0, 1.2815516])  # those quantiles of N(0, 1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def shifted(sigma, shift):
    return shift * sigma / (1 + (shift - 1) * sigma)


def mode(u, scale):
    """arXiv 2403.03206, equation 20; it falls with u."""
    return np.sort(1 - u - scale * (np.cos(np.pi * u / 2) ** 2 - 1 + u))


U = np.array([0.1, 0.5, 0.9])
MU = np.exp(0.5 + (512 - 256) / (4096 - 256) * (1.15 - 0.5))  # of a picture of 512 tokens


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"timestep_sampling": "uniform"}, U),
        ({"timestep_sampling": "sigmoid"}, sigmoid(Z)),
        ({"timestep_sampling": "sigmoid", "sigmoid_scale": 2.0}, sigmoid(2 * Z)),
        ({"timestep_sampling": "shift"}, shifted(sigmoid(Z), 3)),
        ({"timestep_sampling": "shift", "discrete_flow_shift": 0.5}, shifted(sigmoid(Z), 0.5)),
        ({"timestep_sampling": "flux_shift"}, shifted(sigmoid(Z), MU)),
        ({"timestep_sampling": "sigma"}, shifted(U, 3)),
        ({"timestep_sampling": "sigma", "discrete_flow_shift": 1.0}, U),
        # sigma's places count down from the noisiest
        ({"weighting_scheme": "logit_normal", "discrete_flow_shift": 1.0, "logit_mean": 0.5, "logit_std": 0.7},
         np.sort(1 - sigmoid(0.5 + 0.7 * Z))),
        ({"weighting_scheme": "mode", "discrete_flow_shift": 1.0}, np.sort(1 - mode(U, 1.29))),
        ({"weighting_scheme": "mode", "discrete_flow_shift": 1.0, "mode_scale": -0.5}, np.sort(1 - mode(U, -0.5))),
    ],
    ids=str,
)  # fmt: skip
def test_distributions_of_flow_timesteps(given, expected):
    np.testing.assert_allclose(quantiles(**given), expected, atol=0.03)


def test_sigmas_are_the_schedules():
    found = draw(flow(), range(64)).timesteps
    schedule = FlowMatchEulerDiscreteScheduler(shift=3.0)
    assert torch.isin(found, schedule.timesteps).all()
    latents, noise = torch.randn(64, 4, 2, 2), torch.randn(64, 4, 2, 2)
    expected = schedule.scale_noise(latents, found, noise)
    torch.testing.assert_close(flow().at(latents, noise, found).noisy, expected, rtol=0, atol=1e-6)


# --- weights and costs -----------------------------------------------------------------------------------------------


def weights(t: np.ndarray, prediction="epsilon", zero_snr=False, **given) -> np.ndarray:
    zeros = torch.zeros(len(t), 1, 1, 1)
    return diffusion(prediction, zero_snr, **given).at(zeros, zeros, torch.from_numpy(t)).weights.double().numpy()


T = np.array([0, 1, 10, 100, 300, 500, 700, 900, 998, 999])
SNR = alphas()[T] / (1 - alphas()[T])
BOUND = np.minimum(SNR, 1000)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    ("prediction", "given", "expected"),
    [
        ("epsilon", {}, SNR**0),
        ("epsilon", {"min_snr_gamma": 5.0}, np.minimum(SNR, 5) / SNR),
        ("v_prediction", {"min_snr_gamma": 5.0}, np.minimum(SNR, 5) / (SNR + 1)),
        ("v_prediction", {"scale_v_pred_loss_like_noise_pred": True}, BOUND / (BOUND + 1)),
        ("epsilon", {"v_pred_like_loss": 0.5}, 1 + 0.5 * (BOUND + 1) / BOUND),
        ("epsilon", {"debiased_estimation_loss": True}, BOUND**-0.5),
        ("v_prediction", {"debiased_estimation_loss": True}, 1 / (BOUND + 1)),
        ("epsilon", {"min_snr_gamma": 2.0, "v_pred_like_loss": 0.5, "debiased_estimation_loss": True},
         np.minimum(SNR, 2) / SNR * (1 + 0.5 * (BOUND + 1) / BOUND) * BOUND**-0.5),
    ],
    ids=str,
)  # fmt: skip
def test_weights(prediction, given, expected, zero_snr):
    """In float64; finite where the schedule ends at SNR 0, since they stay those of the schedule before."""
    np.testing.assert_allclose(weights(T, prediction, zero_snr, **given), expected, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_the_error_of_the_picture(prediction):
    """Whatever is predicted, a picture that is off by 1 everywhere costs min(SNR, gamma)."""
    objective, latents = diffusion(prediction, min_snr_gamma=5.0), torch.randn(400, 4, 2, 2)
    noised = draw(objective, range(400), latents=latents)
    a = objective.scheduler.alphas_cumprod[noised.timesteps].sqrt().view(-1, 1, 1, 1)
    b = (1 - a**2).sqrt()
    noise = (noised.noisy - a * (latents + 1)) / b
    loss = objective.loss(noised, noise if prediction == "epsilon" else a * noise - b * (latents + 1)).mean()
    kept = alphas()[noised.timesteps]
    assert float(loss) == pytest.approx(float(np.minimum(kept / (1 - kept), 5).mean()), rel=1e-3)


def test_zero_terminal_snr_costs_what_the_last_step_asks():
    """At the end the input is noise alone and the velocity is minus the picture."""
    latents, noise = torch.randn(1, 4, 4, 4), torch.randn(1, 4, 4, 4)
    objective = diffusion("v_prediction", zero_snr=True, min_snr_gamma=5.0, loss_type="huber")
    noised = objective.at(latents, noise, torch.tensor([999]))
    torch.testing.assert_close(noised.noisy, noise)
    torch.testing.assert_close(noised.target, -latents)
    assert float(noised.thresholds) == pytest.approx(0.1)
    assert objective.loss(noised, -latents + 1).isfinite().all()


@pytest.mark.parametrize("scheme", ["sigma_sqrt", "cosmap", "none", "uniform", "mode", "logit_normal"])
def test_flow_weights(scheme):
    sigma = np.array([0.01, 0.3, 0.5, 0.9, 1.0])
    expected = {"sigma_sqrt": sigma**-2, "cosmap": 2 / np.pi / (1 - 2 * sigma + 2 * sigma**2)}.get(scheme, sigma**0)
    zeros = torch.zeros(5, 1, 1, 1)
    for kind in ("sigma_scaled", "raw", "additive"):
        noised = flow(weighting_scheme=scheme, model_prediction_type=kind).at(
            zeros, zeros, torch.from_numpy(1000 * sigma)
        )
        np.testing.assert_allclose(noised.weights, expected if kind == "sigma_scaled" else sigma**0, rtol=1e-5)


def thresholds(objective) -> np.ndarray:
    zeros = torch.zeros(len(T), 1, 1, 1)
    return objective.at(zeros, zeros, torch.from_numpy(T)).thresholds.double().numpy()


@pytest.mark.parametrize("loss_type", ["huber", "smooth_l1"])
def test_huber_thresholds(loss_type):
    given = {"loss_type": loss_type, "huber_c": 0.2, "huber_scale": 3.0}
    sigma = SNR**-0.5
    np.testing.assert_allclose(thresholds(diffusion(**given)), 0.8 / (1 + sigma) ** 2 + 0.2, rtol=1e-4)
    for objective in (diffusion, flow):
        constant, falling = (objective(**given, huber_schedule=name) for name in ("constant", "exponential"))
        np.testing.assert_allclose(thresholds(constant), 0.6, rtol=1e-5)
        np.testing.assert_allclose(thresholds(falling), 3 * 0.2 ** (T / 1000), rtol=1e-5)


def cost(error: float, **given) -> float:
    objective, zeros = diffusion(**given, huber_schedule="constant"), torch.zeros(1, 4, 4, 4)
    return float(objective.loss(objective.at(zeros, zeros, torch.tensor([500])), torch.full_like(zeros, error)))


def test_costs_and_their_limits():
    """Huber is l2 within its threshold and l1 beyond; smooth_l1 is it divided by the threshold."""
    assert cost(3, loss_type="l2") == pytest.approx(9)
    assert cost(-3, loss_type="l1") == pytest.approx(3)
    for error in (1e-4, 0.5, 3):
        assert cost(error, loss_type="huber", huber_c=1e5) == pytest.approx(error**2, rel=1e-5)
        assert cost(error, loss_type="huber", huber_c=1e-8) == pytest.approx(2e-8 * error, rel=1e-3)
        assert cost(error, loss_type="smooth_l1", huber_c=1e-8) == pytest.approx(2 * error, rel=1e-3)
        expected = 2 * 0.1 * ((error**2 + 0.01) ** 0.5 - 0.1)
        assert cost(error, loss_type="huber") == pytest.approx(expected, rel=1e-4)
        assert cost(error, loss_type="smooth_l1") == pytest.approx(10 * expected, rel=1e-4)


# --- options ---------------------------------------------------------------------------------------------------------


def parsed(*argv: str) -> ObjectiveOptions:
    return parse(
        ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o", *argv]
    ).objective


def test_defaults_are_the_rooms_and_0_is_off():
    assert parsed() == ObjectiveOptions()
    off = ("min_snr_gamma", "v_pred_like_loss", "noise_offset", "adaptive_noise_scale", "multires_noise_iterations",
           "ip_noise_gamma", "min_timestep")  # fmt: skip
    assert parsed(*(word for name in off for word in (f"--{name}", "0"))) == ObjectiveOptions()


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--noise_offset=-1"], "--noise_offset=-1.0: must be"),
        (["--huber_c=0"], "--huber_c=0.0: must be"),
        (["--min_timestep=1000"], "--min_timestep=1000: must be from 0 to 999"),
        (["--max_timestep=0"], "--max_timestep=0: must be from 1 to 1000"),
        (["--min_timestep=5", "--max_timestep=4"], "--min_timestep=5: must not be above"),
        (["--mode_scale=2"], "--mode_scale=2.0: must be"),
        (["--adaptive_noise_scale=1"], "--adaptive_noise_scale needs --noise_offset"),
        (["--loss_type=l3"], "--loss_type"),
        (["--timestep_sampling=sometimes"], "--timestep_sampling"),
    ],
    ids=str,
)
def test_wrong_values_end_in_a_line(argv, told):
    with pytest.raises(DeftError) as error:
        parsed(*argv)
    assert told in str(error.value)


def test_weights_of_another_prediction_are_refused():
    with pytest.raises(DeftError, match="--scale_v_pred_loss_like_noise_pred: "):
        diffusion(scale_v_pred_loss_like_noise_pred=True)
    with pytest.raises(DeftError, match="--v_pred_like_loss: "):
        diffusion("v_prediction", v_pred_like_loss=0.1)
    with pytest.raises(DeftError, match="--huber_schedule"):
        flow(loss_type="huber")


def family(kind: str) -> SimpleNamespace:
    return SimpleNamespace(objective=kind, noise_scheduler=scheduler, **SD_SCRIPTS)


# every option at a value of its own, with what it needs to have an effect
WITH_EFFECT = {
    "diffusion": [
        {"min_snr_gamma": 5.0, "debiased_estimation_loss": True, "v_pred_like_loss": 0.1},
        {**EVERY_NOISE, "multires_noise_discount": 0.5, "min_timestep": 1, "max_timestep": 999},
        {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.2, "huber_scale": 2.0},
    ],
    "flow": [
        {"timestep_sampling": "shift", "sigmoid_scale": 2.0, "discrete_flow_shift": 2.0, **RAW},
        {"weighting_scheme": "logit_normal", "logit_mean": 1.0, "logit_std": 2.0, **RAW},
        {"weighting_scheme": "mode", "mode_scale": 1.0, "discrete_flow_shift": 2.0, **RAW},
        {"timestep_sampling": "uniform", "weighting_scheme": "cosmap"},
        {"loss_type": "huber", "huber_schedule": "constant", "huber_c": 0.2, "huber_scale": 2.0, **RAW},
        {"ip_noise_gamma": 0.1, "ip_noise_gamma_random_strength": True, **RAW},
    ],
}


@pytest.mark.parametrize(("kind", "given"), [(kind, given) for kind, many in WITH_EFFECT.items() for given in many])
def test_what_has_an_effect_is_not_called_unused_and_has_one(kind, given, caplog):
    options = ObjectiveOptions(**given)
    objective = objective_of(options, family(kind))
    assert "without effect" not in caplog.text

    def outcome(objective):
        noised = draw(objective, range(64))
        return torch.stack([noised.noisy.flatten(1).mean(1), objective.loss(noised, torch.ones_like(noised.noisy))])

    for name in given:
        try:
            without = objective_of(replace(options, **{name: getattr(ObjectiveOptions(), name)}), family(kind))
        except DeftError:
            continue  # an option that others need
        assert not torch.equal(outcome(objective), outcome(without)), name


@pytest.mark.parametrize(
    ("kind", "given", "names"),
    [
        ("diffusion", dict.fromkeys(FLOW_ONLY, "x"), FLOW_ONLY),
        ("flow", dict.fromkeys(DIFFUSION_ONLY, 7) | RAW, DIFFUSION_ONLY),
        ("diffusion", {"huber_c": 0.2, "huber_scale": 2.0}, ["huber_c", "huber_scale"]),
        ("diffusion", {"loss_type": "huber", "huber_scale": 2.0}, ["huber_scale"]),
        ("diffusion", {"noise_offset_random_strength": True}, ["noise_offset_random_strength"]),
        ("diffusion", {"multires_noise_discount": 0.2}, ["multires_noise_discount"]),
        ("diffusion", {"ip_noise_gamma_random_strength": True}, ["ip_noise_gamma_random_strength"]),
        ("flow", {"sigmoid_scale": 2.0, **RAW}, ["sigmoid_scale"]),
        ("flow", {"timestep_sampling": "flux_shift", "discrete_flow_shift": 2.0, **RAW}, ["discrete_flow_shift"]),
        ("flow", {"weighting_scheme": "cosmap", **RAW}, ["weighting_scheme"]),
        ("flow", {"timestep_sampling": "shift", "weighting_scheme": "mode", "mode_scale": 1.0, **RAW},
         ["weighting_scheme", "mode_scale"]),
        ("flow", {"logit_mean": 1.0, "mode_scale": 1.0, **RAW}, ["logit_mean", "mode_scale"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_has_no_effect_is_said_once(kind, given, names, caplog):
    with caplog.at_level(logging.WARNING):
        objective_of(ObjectiveOptions(**given), family(kind))
    lines = [record.getMessage() for record in caplog.records]
    for name in names:
        assert sum(f"--{name}" in line.split(":")[0].split(", ") for line in lines) == 1, name
    told = [word for line in lines for word in line.split(":")[0].split(", ")]
    assert sorted(told) == sorted(f"--{name}" for name in names)


def test_sigma_scaled_is_warned_of(caplog):
    objective_of(ObjectiveOptions(), family("flow"))
    assert "give raw" in caplog.text
