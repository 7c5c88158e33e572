"""Drift and what is learnt: by formulas written anew; that they cost little and disturb nothing; what comes of them."""

from __future__ import annotations

import copy
import json
import math
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open

import train_network_deft
from library.data import plan as plans
from library.options.parse import parse
from library.options.rooms import CaptionOptions, MeterOptions, ObjectiveOptions, PreservationOptions, SaveOptions
from library.prompts import Prompt
from library.training import meters, prepare
from library.training.given import METERED
from library.training.losses import Losses
from library.training.meters import Drift, Learnt, chosen, every_of, interval
from library.training.naming import ENOUGH, best
from library.training.objective import Diffusion, objective_of
from library.training.randoms import Purpose, Randoms
from library.training.record import Reading, Record, Saved
from library.training.saves import planned
from library.training.state import Length
from library.training.texts import Texts
from library.training.validation import undisturbed
from library.training.watch import NOTHING, watch_of
from networks.deft_config import DeftError
from tests import small_data, small_flux, small_models, small_omnigen
from tests.conftest import arguments, deltas, in_two_processes, network_of
from tests.test_data_sets import Attached
from tests.test_resume import assert_equal, run, tensors, train_of_34_steps

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

PROMPTS = [Prompt("a cat"), Prompt("two dogs"), Prompt("a red car")]


def losses_of(model, network, **objective) -> Losses:
    accelerator = Accelerator(cpu=True)
    found = objective_of(ObjectiveOptions(**objective), model)
    return Losses(model, Attached(network), Texts(model, accelerator), found, PreservationOptions(), accelerator)


def measured(meter, losses: Losses) -> float:
    with undisturbed(losses.adapter.module, losses.accelerator):
        return meter.measure()


# --- what they measure ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_drift_is_the_formula_in_float64_with_the_deltas_in_the_weights(model):
    """Of one adapter in the U-Net and the text encoder, on pictures of two sizes."""
    network = network_of(model)
    losses = losses_of(model, network)
    latents = [torch.randn(1, 4, *size) for size in ((8, 8), (8, 16), (8, 8))]
    drift = Drift(PROMPTS, latents, losses, batch_size=3)
    assert {len(asked.captions) for _, asked, _ in drift.questions} <= {1, 2, 3}
    found, changes = measured(drift, losses), deltas(network)
    network.set_multiplier(0.0)
    for part in (model.denoiser, *model.text_encoders):
        part.double()
    base = [copy.deepcopy(part) for part in (model.denoiser, model.text_encoders[0])]
    for module in network.all_modules:
        weight = module.org_module.weight
        weight += changes[module.lora_name].view_as(weight).double()
    changed = [model.denoiser, model.text_encoders[0]]
    alphas = model.noise_scheduler().alphas_cumprod.double()
    middles = [62, 437, 812, 187, 562, 937, 312, 687]  # of eight parts of 0 to 1000, every third
    off = whole = 0.0
    for i, t in enumerate(middles):
        x = latents[i % 3].double()
        noise = Randoms(0, 2**40, [i]).normal(Purpose.NOISE, x.shape[1:]).double()
        noisy = alphas[t].sqrt() * x + (1 - alphas[t]).sqrt() * noise
        ids = model.readers[0].tokens([PROMPTS[i % 3].text])[0]
        ids = ids if isinstance(ids, torch.Tensor) else torch.tensor(ids)
        one, other = (
            unet(noisy, t, encoder(ids.view(1, -1)).last_hidden_state).sample for unet, encoder in (base, changed)
        )
        off, whole = off + float((other - one).square().sum()), whole + float(one.square().sum())
    assert found == pytest.approx(off / whole, rel=1e-3)
    assert found > 1e-4


def test_an_adapter_that_does_nothing_drifts_and_learns_nothing(model, photos):
    losses = losses_of(model, network_of(model, trained=False, removal="0"))
    latents = [torch.randn(1, 4, 8, 8)]
    assert measured(Drift(PROMPTS[:1], latents, losses, 4), losses) == 0
    found = Learnt(loader_of(photos.parent, model), losses)
    assert min(found.base) > 0
    assert measured(found, losses) == 0


def loader_of(root: Path, model, **changes):
    plan, latents = small_data.read(root, model, **changes)
    accelerator = Accelerator(cpu=True)
    return prepare.loader_of(
        chosen(plan), 0, shuffle=False, weight=1.0, latents=latents, model=model, accelerator=accelerator
    )


class Knowing(small_data.Model):
    """Answers with its multiplier's share of the noise that a picture has, which it knows."""

    takes_pictures, dropped, text_encoders, share = False, "", [], 0.0

    def __init__(self, scheduler, picture):
        self.alphas, self.picture = scheduler.alphas_cumprod, picture

    def encode_text(self, captions):
        return {}

    def predict(self, noisy, timesteps, text, sizes):
        alphas = self.alphas[timesteps].view(-1, 1, 1, 1)
        return self.share * (noisy - alphas.sqrt() * self.picture) / (1 - alphas).sqrt()


@pytest.mark.parametrize("options", [{}, {"min_snr_gamma": 5}, {"loss_type": "l1"}], ids=str)
def test_all_is_learnt_by_an_adapter_that_answers_right(model, tmp_path, options):
    (tmp_path / "1_a").mkdir()
    Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "1_a" / "a.png")
    scheduler = model.noise_scheduler()
    _plan, latents = small_data.read(tmp_path, small_data.Model())
    picture = next(iter(latents.entries._entries.values()))["latents"]
    knowing = Knowing(scheduler, picture)
    answers = [1.0]  # the share that is answered at multiplier 1
    adapter = Namespace(
        module=torch.nn.Linear(1, 1), set_multiplier=lambda m: setattr(knowing, "share", m * answers[-1])
    )
    accelerator = Accelerator(cpu=True)
    objective = Diffusion(ObjectiveOptions(**options), scheduler)
    losses = Losses(knowing, adapter, Texts(knowing, accelerator), objective, PreservationOptions(), accelerator)
    loader = loader_of(tmp_path, knowing)
    assert loader.pictures == meters.PROBES
    halved = 0.5 if options.get("loss_type") == "l1" else 0.75
    for answer, expected in ((1.0, 1.0), (0.5, halved), (0.0, 0.0), (-3.0, -1.0)):
        answers.append(answer)
        assert measured(Learnt(loader, losses), losses) == pytest.approx(expected, abs=1e-4)


def test_pictures_come_from_all_over_and_none_that_are_only_kept(tmp_path):
    for name, number in (("2_a", 3), ("1_b", 20)):
        (tmp_path / name).mkdir()
        for i in range(number):
            Image.new("RGB", (64, 64 + 64 * (i % 2)), (i, 0, 0)).save(tmp_path / name / f"{i:02d}.png")
    found = list(plans.pictures(chosen(small_data.planned(tmp_path))))
    assert [one.repeats for one in found] == [1] * meters.PROBES
    assert {one.path.parent.name for one in found} == {"2_a", "1_b"}
    assert [one.repeats for one in plans.pictures(chosen(small_data.planned(tmp_path), 40))].count(2) == 17
    whole = next(
        plans.pictures(chosen(small_data.planned(tmp_path, captions=CaptionOptions(caption_dropout_rate=1.0))))
    )
    assert whole.subset.captions.caption_dropout_rate == 0
    kept = small_data.planned(tmp_path, custom_attributes={"diff_output_preservation": True})
    assert chosen(kept) == ()


# --- what they cost ---------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 20_000),
    st.floats(0.5, 64),
    st.one_of(st.none(), st.integers(1, 3000)),
)
def test_the_interval_costs_less_than_three_in_a_hundred(steps, pictures, every_save):
    """Counted over the training as it would run."""
    saves = {*range(every_save or steps, steps, every_save or steps), steps}
    found = interval(steps, pictures, saves)
    forwards = 2 * steps * pictures

    def cost(measurements: int) -> float:
        return METERED * meters.STEPS + 2 * meters.PROBES * (1 + measurements)

    if found is None:
        assert cost(meters.FEWEST) > 0.03 * forwards
        return
    read = [step for step in range(1, steps + 1) if step % found == 0 or step in saves]
    if len(saves) * 2 * meters.PROBES <= 0.03 * forwards - cost(0) and len(saves) <= 20:
        assert len(read) <= 20
        assert cost(len(read)) <= 0.03 * forwards
    else:
        assert read == sorted(saves)


def test_what_is_asked_for_counts_more_than_what_it_costs():
    assert every_of(MeterOptions(None, None), 3, 1, {3}) is None
    assert every_of(MeterOptions(7, None), 3, 1, {3}) == 7
    assert every_of(MeterOptions(0, None), 10**6, 1, {10**6}) is None
    assert every_of(MeterOptions(None, 0.1), 100, 1, {100}) == 5


@pytest.mark.parametrize("changes", [{"save_n_epoch_ratio": 2}, {"save_every_n_steps": 4, "save_every_n_epochs": 1}],
                         ids=str)  # fmt: skip
def test_every_file_says_what_was_measured_before_it(model_folder, photos, tmp_path, changes):
    options = {"max_train_steps": 6, "train_batch_size": 2, "meter_every_n_steps": 100}
    assert train_network_deft.main(arguments(model_folder, photos, tmp_path, **options, **changes)) == 0
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    steps = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            fields = opened.metadata()
        steps.add(int(fields["ss_steps"]))
        assert float(fields["ss_meter_drift"]) > 0
        assert math.isfinite(float(fields["ss_meter_learnt"]))
    none = dict.fromkeys(SaveOptions.__dataclass_fields__)
    assert planned(SaveOptions(**none | changes), Length(6, 2), 3) == steps


# --- that they disturb nothing ----------------------------------------------------------------------------------------


def curves(state: Path) -> dict[str, tuple[list[int], list[float]]]:
    found = Record.read(state).curves
    return {name: (found[f"meter/{name}"].steps, found[f"meter/{name}"].values) for name in ("drift", "learnt")}


def test_a_training_with_meters_is_bit_for_bit_the_one_without_and_goes_on_so(model_folder, photos, tmp_path):
    out, common = tmp_path / "out", {"save_every_n_steps": 4, "save_state": True, "max_train_steps": 8}
    argv = train_of_34_steps(model_folder, photos, tmp_path, **common)
    run([*argv, "--meter_every_n_steps", "0"])
    without = tensors(out)
    run([*argv, "--meter_every_n_steps", "3"])
    assert_equal(tensors(out), without)
    whole = curves(out / "cat-state")
    assert whole["drift"][0] == [3, 4, 6, 8]
    assert all(value > 0 for value in whole["drift"][1])
    run([*argv, "--meter_every_n_steps", "3", "--output_name", "on", "--resume", str(out / "cat-step00000004-state")])
    again = curves(out / "on-state")
    assert_equal(tensors(out, "on"), without)
    for name, (steps, values) in whole.items():
        assert again[name] == (steps, pytest.approx(values, rel=1e-6))


TWO = """
import train_network_deft as trainer
sys.exit(trainer.main(sys.argv[1:]))
"""


def test_two_processes_measure_what_one_does(model_folder, photos, tmp_path):
    next(photos.glob("*_5.jpg")).unlink()
    common = {"learning_rate": 1e-3, "max_train_steps": 4, "meter_every_n_steps": 2, "save_state_on_train_end": True}
    given = {
        number: arguments(
            model_folder, photos, tmp_path, **common, gradient_accumulation_steps=2 // number, output_name=f"{number}"
        )
        for number in (1, 2)
    }
    assert train_network_deft.main(given[1]) == 0
    in_two_processes(tmp_path, TWO, *given[2])
    one, two = (curves(tmp_path / "out" / f"{number}-state") for number in (1, 2))
    for name, (steps, values) in one.items():
        assert steps == [2, 4]
        assert two[name] == (steps, pytest.approx(values, rel=1e-3))


def test_cached_texts_measure_the_same(model_folder, photos, tmp_path):
    (tmp_path / "keep.txt").write_text("a bear\na boat --d 3\n")
    common = {"max_train_steps": 2, "meter_every_n_steps": 1, "save_state_on_train_end": True, "learning_rate": 1e-3,
              "network_train_unet_only": True, "no_metadata": True,
              "network_args": [f"keep={tmp_path / 'keep.txt'}"]}  # fmt: skip
    found = []
    for cached in (None, True):
        options = {**common, "cache_text_encoder_outputs": cached, "output_name": f"{cached}"}
        assert train_network_deft.main(arguments(model_folder, photos, tmp_path, **options)) == 0
        found.append(curves(tmp_path / "out" / f"{cached}-state"))
        with safe_open(tmp_path / "out" / f"{cached}.safetensors", "pt") as opened:
            assert not [key for key in opened.metadata() if key.startswith("ss_meter")]
    for name, (steps, values) in found[0].items():
        assert found[1][name] == (steps, pytest.approx(values, rel=1e-3))


@pytest.mark.parametrize("family", ["sdxl", "flux", "omnigen"])
def test_every_family_is_measured(photos, tmp_path, family):
    build = {
        "sdxl": lambda: small_models.build("sdxl", tmp_path / "model"),
        "flux": lambda: small_flux.build(tmp_path / "model").folder,
        "omnigen": lambda: small_omnigen.build(tmp_path / "model"),
    }[family]
    options = {"max_train_steps": 2, "meter_every_n_steps": 1, "save_state_on_train_end": True, "learning_rate": 1e-3}
    options |= {"min_snr_gamma": 5} if family == "sdxl" else {"loss_type": "l1"}
    assert train_network_deft.main(arguments(build(), photos, tmp_path, **options)) == 0
    for steps, values in curves(tmp_path / "out" / "cat-state").values():
        assert steps == [1, 2]
        assert all(math.isfinite(value) and abs(value) > 1e-9 for value in values)


# --- what comes of them -----------------------------------------------------------------------------------------------


def test_a_drift_ends_a_training_as_if_it_were_over(model_folder, photos, tmp_path, caplog):
    options = {"max_train_steps": 12, "meter_every_n_steps": 2, "stop_at_drift": 1e-9, "save_every_n_epochs": 1,
               "save_state": True, "learning_rate": 1e-3}  # fmt: skip
    with caplog.at_level("INFO"):
        assert train_network_deft.main(arguments(model_folder, photos, tmp_path, **options)) == 0
    assert len([line for line in caplog.messages if "--stop_at_drift 1e-09 ends the training here" in line]) == 1
    assert "--stop_at_drift 1e-09 ends the training here" in (tmp_path / "out" / "cat.html").read_text()
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["cat-state", "cat.html", "cat.safetensors"]
    assert json.loads((out / "cat-state" / "train_state.json").read_text())["step"] == 2
    with safe_open(out / "cat.safetensors", "pt") as opened:
        assert opened.metadata()["ss_steps"] == "2"
    more = arguments(model_folder, photos, tmp_path, **options | {"stop_at_drift": 1e9, "resume": out / "cat-state"})
    assert train_network_deft.main(more) == 0
    with safe_open(out / "cat.safetensors", "pt") as opened:
        assert opened.metadata()["ss_steps"] == "12"


def test_a_drift_to_stop_at_needs_the_meters(model_folder, photos, tmp_path):
    wrong = arguments(model_folder, photos, tmp_path, stop_at_drift=0.1, meter_every_n_steps=0)
    with pytest.raises(DeftError, match="--stop_at_drift needs the meters"):
        parse(wrong)


def watched(model_folder, photos, tmp_path, has_loss: bool = True, **changes):
    run = parse(arguments(model_folder, photos, tmp_path, **changes))
    return watch_of(run.data.datasets, run.network, run.optimizer, 100, has_loss)


def test_nothing_learnt_is_said_once_with_causes_that_fit(model_folder, photos, tmp_path):
    for changes, cause in (
        ({"learning_rate": 1e-8}, "a learning rate of 1e-08 is low: 0.0002 is usual"),
        ({"learning_rate": 1e-8, "optimizer_type": "Lion"}, "2e-05 is usual"),
        ({"learning_rate": 1, "optimizer_type": "Prodigy"}, "the steps are too few"),
        ({"learning_rate": 1}, "a learning rate of 1 is high"),
        ({"unet_lr": 1e-8, "network_train_unet_only": True}, "a learning rate of 1e-08 is low"),
        ({"caption_dropout_rate": 1.0}, "nearly every caption is left out"),
        ({"network_train_text_encoder_only": True}, "the denoiser, which draws, learns nothing"),
        ({"scale_weight_norms": 1e-3}, "--scale_weight_norms 0.001"),
        ({"has_loss": False}, "the masks are black"),
    ):
        watch = watched(model_folder, photos, tmp_path, **changes)
        assert list(watch.lines(Reading(20, 0.0, 0.0))) == []
        (line,) = watch.lines(Reading(40, 0.0, 0.0))
        assert line.startswith("step 40: nothing has been learnt so far (learnt 0.0000, drift 0.000). Likely: ")
        assert cause in line
        assert list(watch.lines(Reading(60, 0.0, 0.0))) == []
        assert list(watched(model_folder, photos, tmp_path, **changes).lines(Reading(99, 0.01, 0.02))) == []


def test_a_drift_that_runs_away_is_said_once(model_folder, photos, tmp_path):
    for drift, learnt, much in ((0.25, 0.9, True), (0.15, 0.9, False), (0.06, 0.03, True), (0.04, 0.03, False)):
        watch = watched(model_folder, photos, tmp_path, learning_rate=1e-2)
        found = [line for step in (1, 2) for line in watch.lines(Reading(step, drift, learnt))]
        assert len(found) == much
        assert all("a learning rate of 0.01 is high" in line and "keep=configs/keep.txt" in line for line in found)


def test_a_training_that_learns_nothing_says_so_while_it_runs(model_folder, photos, tmp_path, caplog):
    options = {"meter_every_n_steps": 1, "max_train_steps": 4, "learning_rate": 1e-12}
    assert train_network_deft.main(arguments(model_folder, photos, tmp_path, **options)) == 0
    assert len([line for line in caplog.messages if "nothing has been learnt so far" in line]) == 1
    assert not [line for line in caplog.messages if "the earliest file" in line]


SAVES = st.lists(st.tuples(st.floats(-0.1, 1), st.floats(0, 1), st.booleans()), min_size=1, max_size=12)


@given(saves=SAVES, curve=st.lists(st.floats(-0.1, 1), max_size=20))
def test_the_named_file_is_the_earliest_that_has_learnt_enough(tmp_path_factory, saves, curve):
    folder, record = tmp_path_factory.mktemp("out"), Record()
    for i, (learnt, drift, there) in enumerate(saves):
        record.saved(Saved(f"{i}.safetensors", 100 * (i + 1), 1, drift, learnt))
        if there:
            (folder / f"{i}.safetensors").touch()
    for i, learnt in enumerate(curve):
        record.log({"meter/learnt": learnt}, 7 * (i + 1))
    found = best(record, folder)
    most = max(learnt for learnt, _, _ in saves)
    enough = [i for i, (learnt, _, there) in enumerate(saves) if there and learnt >= ENOUGH * most]
    if most < NOTHING or not enough:
        assert found is None
        return
    assert found.file.name == f"{enough[0]}.safetensors"
    assert found.last.name == f"{len(saves) - 1}.safetensors"
    early = [7 * (i + 1) for i, learnt in enumerate(curve) if learnt >= ENOUGH * most and 7 * (i + 1) <= 75]
    assert found.earlier == (early[0] if early else None)
    assert f"step {100 * (enough[0] + 1)}" in found.line()
    assert (f"--save_every_n_steps {found.earlier}" in found.line()) == bool(early)


def test_files_of_before_the_meters_are_not_named(tmp_path):
    (tmp_path / "a.safetensors").touch()
    assert best(Record(files=[Saved("a.safetensors", 1, 1)]), tmp_path) is None
