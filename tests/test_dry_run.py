"""--dry_run: what it says is what the training then does, and nothing is written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from library.estimate import page, phases, pretending
from library.estimate.ledger import BLOCK, Ledger, Rates
from library.models import sd
from library.models.family import TILE, Family
from library.options.parse import parse
from library.options.rooms import Run
from library.training import given
from library.training.state import Length
from tests import small_flux, small_models, small_omnigen
from tests.conftest import arguments, loaded, reset_accelerator

RATES = Rates({torch.float32: 1e12}, 1e12, 1e6)
FEW = {"network_dim": 2, "network_train_unet_only": True,
       "network_args": ["network_reg_dims=down_blocks=0,up_blocks=0"]}  # fmt: skip


def test_bytes_of_a_network_that_can_be_counted_by_hand():
    """Two layers of 256 x 256 numbers: their weights, what is alive when the backward pass begins, and gradients."""
    ledger = Ledger(RATES)
    with pretending.card(), ledger:
        one, other = (torch.nn.Parameter(torch.empty(256, 256, device="cuda:0")) for _ in range(2))
        ledger.claim("weights", [one, other])
        x = torch.empty(64, 256, device="cuda:0")
        ledger.start()
        hidden = x @ one
        y = hidden @ other
        matrix, batch = 256 * 256 * 4, 64 * 256 * 4
        assert ledger.now["weights"] == 2 * matrix
        assert ledger.total == 2 * matrix + 3 * batch
        assert sum(ledger.work.flops.values()) == 2 * 2 * 64 * 256 * 256
        y.sum().backward()
        assert one.grad is not None
        del y, hidden
        assert ledger.total <= 4 * matrix + batch + 2 * BLOCK  # and a sum, of one number
        assert ledger.peak >= 3 * matrix + 3 * batch


def test_the_page_is_what_the_training_does(run, tmp_path, capsys, caplog):
    options = {"network_dim": 4, "save_every_n_steps": 1, "save_state": True, "save_last_n_steps_state": 1,
               "max_train_steps": 4}  # fmt: skip
    assert run(**options, dry_run=True) == 0
    told = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    assert all(len(line) <= 80 for line in told.splitlines())
    assert len(told.splitlines()) <= 50
    parameters = int(re.search(r"([\d,]+) parameters", told)[1].replace(",", ""))
    size = re.search(r"a file of ([\d.]+ \w+)", told)[1]
    with caplog.at_level("INFO"):
        assert run(**options) == 0
    assert f"training {parameters:,} parameters for 4 steps in 1 epochs" in caplog.text
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert f"{len(files)} files" in told
    assert f"{len(list((tmp_path / 'out').glob('*-state')))} states" in told
    written = (tmp_path / "out" / "cat.safetensors").stat().st_size
    assert page._size(round(written)).split()[1] == size.split()[1]
    assert abs(float(page._size(written).split()[0]) / float(size.split()[0]) - 1) < 0.01


def test_what_is_cast_is_what_torch_casts():
    """torch's own header, which its wheels hold, says what autocast does on CUDA."""
    header = Path(torch.__file__).parent / "include" / "ATen" / "autocast_mode.h"
    if not header.exists():
        pytest.skip("a torch without headers")
    text = header.read_text(encoding="utf-8")
    for ours, macro in (
        (pretending.LOWER, "LOWER_PRECISION_FP"), (pretending.FULL, "FP32"),
        (pretending.FULL_RESULT, "FP32_SET_OPT_DTYPE"),
    ):  # fmt: skip
        lines = re.search(rf"#define AT_FORALL_{macro}\(_\)((?:.*\\\n)*.*\n)", text)[1]
        theirs = set(re.findall(r"_\((\w+)", lines))
        public = {name for name in theirs if hasattr(torch, name) or hasattr(torch.nn.functional, name)}
        assert {n for n in ours if not n.startswith("__")} - {"interpolate", "norm"} == {
            n for n in public if n[0] != "_"
        }


FAMILIES = {
    "sd2": {"mixed_precision": "bf16", "network_train_unet_only": True},
    "sdxl": {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "gradient_checkpointing": True},
    "flux": {"mixed_precision": "bf16", "network_train_unet_only": True},
    "omnigen": {"mixed_precision": "bf16", "train_batch_size": 2},
    "one file": {"network_train_unet_only": True},
}


@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind, photos, tmp_path, monkeypatch, fresh_accelerator, capsys, caplog):
    """The parameters that are told are those that the training then has."""
    import train_network_deft

    options = {"network_dim": 2, "max_train_steps": 1, **FAMILIES[kind]}
    if kind == "omnigen":
        model = small_omnigen.build(tmp_path / "model")
    elif kind == "flux":
        model = small_flux.build(tmp_path / "model").folder
    else:
        model = small_models.build("sd15" if kind == "one file" else kind, tmp_path / "sd15")
    if kind == "one file":
        monkeypatch.setattr(sd, "CONFIGS", tmp_path)  # of a file of these sizes
        options["tokenizer"] = model / "tokenizer"
        file = tmp_path / "model.safetensors"
        save_file(small_models.single_file(loaded(model).pipeline), file)
        model = file
    given = arguments(model, photos, tmp_path, **options)
    assert train_network_deft.main([*given, "--dry_run"]) == 0
    told = re.search(r"([\d,]+) parameters", capsys.readouterr().out)[1]
    reset_accelerator()
    with caplog.at_level("INFO"):
        assert train_network_deft.main(given) == 0
    assert f"training {told} parameters" in caplog.text


def test_samples_are_told_whole_and_in_tiles(model_folder, photos, tmp_path, monkeypatch):
    """What decides is what is needed: that of a picture that is decoded in tiles from the start."""
    found = {}
    for size, in_tiles in ((768, False), (768, True), (64, False)):
        (tmp_path / "p.txt").write_text(f"a cat --w {size} --h {size} --s 2")
        options = FEW | {"sample_prompts": tmp_path / "p.txt", "sample_at_first": True}
        trial = parse(arguments(model_folder, photos, tmp_path, **options))
        with monkeypatch.context() as patched:
            if in_tiles:
                decode = Family.decode

                def short(model: Family, latents: torch.Tensor, decode: Any = decode) -> Any:
                    model.vae.tile_latent_min_size, model.vae.tile_sample_min_size = TILE, TILE * 8
                    model.vae.enable_tiling()
                    return decode(model, latents)

                patched.setattr(Family, "decode", short)
            found[size, in_tiles] = of_samples(trial)
    whole, tiles, small = found.values()
    assert small.least == small.peak
    assert whole.least < 0.6 * whole.peak
    assert whole.least == pytest.approx(tiles.peak, rel=0.1)
    assert sum(whole.parts.values()) == whole.least


def of_samples(run: Run) -> phases.Phase:
    estimate = phases.estimate(
        run, given.read(run), phases.empty_model(run), RATES, Length(1, 1), asked=[phases.SAMPLES]
    )
    (found,) = (phase for phase in estimate.phases if phase.name == phases.SAMPLES)
    return found


def test_a_samples_steps_are_many_and_its_texts_and_its_decoding_one(model_folder, photos, tmp_path, monkeypatch):
    """Of a picture without steps, what is left is what the text encoder and the VAE have to do."""
    operations = []
    for steps in (1, 3):
        (tmp_path / "p.txt").write_text(f"a cat --w 1024 --h 1024 --s {steps}")
        options = FEW | {"sample_prompts": tmp_path / "p.txt", "sample_at_first": True}
        operations.append(of_samples(parse(arguments(model_folder, photos, tmp_path, **options))).work.operations)
    one, three = operations
    a_step = (three - one) / 2
    alone = []
    model = loaded(model_folder)
    for does in (lambda: model.decode(torch.zeros(1, 4, 128, 128)), lambda: model.encode_text([""])):
        counted = Ledger(RATES)
        with pretending.card(), counted, torch.no_grad():
            for part in (model.vae, *model.text_encoders):
                pretending.filled(part, pretending.CARD)
            monkeypatch.setattr(model.pipeline.image_processor, "postprocess", phases._not_shown)
            counted.start()
            does()
        alone.append(counted.work.operations)
    assert a_step > sum(alone)
    assert one - a_step >= alone[0] + 2 * alone[1]


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": 68},  # no multiple of what the model has
        {"sample_prompts": "a cat --w 4 --h 4"},
        {"broken": True},
        {"mixed_precision": "fp16"},
        {"network_args": ["layers=nowhere"]},
    ],
    ids=str,
)
def test_what_the_training_refuses_is_refused_by_the_same_line(run, photos, tmp_path, capsys, options):
    if "sample_prompts" in options:
        (tmp_path / "p.txt").write_text(options["sample_prompts"])
        options = {"sample_prompts": tmp_path / "p.txt"}
    if options.pop("broken", False):
        for file in photos.glob("*.*"):
            if file.suffix != ".txt":
                file.write_bytes(file.read_bytes()[:2000])
    told = []
    for dry in (None, True):
        reset_accelerator()
        assert run(**options, dry_run=dry) == 2
        told.append(capsys.readouterr().err.strip().splitlines()[-1])
    assert told[0] == told[1]
