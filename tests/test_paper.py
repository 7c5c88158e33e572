"""The shared room of the paper's benchmarks: adapters on equal terms, seeds, records, processes, choice of rates."""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from benchmarks import dreambooth
from benchmarks.paper import adapters, choosing, training
from benchmarks.paper.choosing import Criterion
from benchmarks.paper.generating import Painter
from benchmarks.paper.labels import ADAPTERS, PEFT, network_args
from benchmarks.paper.metrics import Choice, Drawn
from benchmarks.paper.plan import BASE, Asked, Row, Subject
from benchmarks.paper.processes import Alone, Several, share
from benchmarks.paper.records import Records
from benchmarks.paper.scoring import Scores
from benchmarks.paper.settings import Method, Settings, Training, name_of_file, seed_of
from benchmarks.paper.stages import Room
from library.training.loop import TrainingLoop
from library.training.saves import TrainingStopped
from networks.deft_config import DeftError
from tests import small_dreambooth, small_flux, small_omnigen
from tests.conftest import loaded

RANK = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small_dreambooth.build(tmp_path_factory.mktemp("dreambooth") / "dataset")


@pytest.fixture
def settings(data, model_folder, tmp_path) -> Settings:
    return settings_of(data, model_folder, tmp_path / "out")


def settings_of(data: Path, model: Path, output: Path) -> Settings:
    return Settings(
        data=data, model=model, output=output, config=None, models={}, adapters=("deft",), rank=RANK, rates=(1e-3,),
        steps=1, seeds=1, size=64, guidance=None, drawing_steps=2, precision="no", images_per_prompt=1,
        limit_prompts=2, device="cpu",
    )  # fmt: skip


# --- adapters ---


TRIED = ("lora", "dora", "oft", "peft-deft-qr", "deft", "deft-none", "para")


@pytest.fixture(scope="module")
def trained(data, model_folder, tmp_path_factory):
    """Of each adapter, after a step on the same subject: record, losses, file, layers, and what its model answers."""
    output, found = tmp_path_factory.mktemp("adapters"), {}
    settings = settings_of(data, model_folder, output)
    pictures = tuple(sorted((data / "dog").glob("*.jpg")))
    subject = Subject("dog", tuple(Row(one, "a photo of sks dog") for one in pictures), (), pictures)
    training.write_data(settings, subject)
    after, losses, made = TrainingLoop._after_step, [], []

    def noting(loop):
        after(loop)
        losses.append(loop.recent_losses[-1])

    def adapter_of(label):
        def build(*given):
            made.append((adapters.adapter_of(label)(*given), given[2]))
            return made[-1][0]

        return build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_after_step", noting)
        patch.setattr(training, "adapters", argparse.Namespace(adapter_of=adapter_of, LAYERS=adapters.LAYERS))
        for label in TRIED:
            one = Training(Method(label, RANK, 1e-2, 1), subject, 0)
            record = training.train(settings, one)
            adapter, model = made.pop()
            adapter.module.eval()
            found[label] = record, losses[-1], training.file_of(settings, one), answer(model.denoiser)
    return found


@torch.no_grad()
def answer(denoiser: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    noisy, text = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, 64)))
    return denoiser(noisy, torch.tensor([500]), text).sample


@pytest.mark.parametrize("label", TRIED)
def test_a_saved_file_answers_as_what_was_trained(trained, model_folder, label):
    _, _, file, expected = trained[label]
    model = loaded(model_folder)
    before = answer(model.denoiser)
    names = [name for name, _ in model.denoiser.named_modules()]
    with adapters.attached(model, file):
        found = answer(model.denoiser)
    assert (expected - before).abs().max() > 1e-4, "it has learnt something"
    if label in PEFT:
        assert torch.equal(found, expected)
    else:  # trained as DEFT, read as the LoRA that the file is
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(answer(model.denoiser), before), "nothing of it is left"
    assert [name for name, _ in model.denoiser.named_modules()] == names


def test_data_and_noise_are_the_same_for_all(trained):
    """All that start as the base model have the same first loss; PaRa, which does not, has another."""
    losses = {label: loss for label, (_, loss, _, _) in trained.items()}
    for label in set(TRIED) - {"para"}:
        assert losses[label] == pytest.approx(losses["lora"], rel=1e-5)
    assert losses["para"] != pytest.approx(losses["lora"], rel=1e-4)


def test_equal_ranks_on_the_same_layers_are_as_many_parameters(trained, model_folder):
    number = {label: record["parameters"] for label, (record, *_) in trained.items()}
    names = adapters.targets_of(loaded(model_folder).denoiser)
    assert {name.split(".attn")[1].split(".", 1)[1] for name in names} == {"to_q", "to_k", "to_v", "to_out.0"}
    layers = dict(loaded(model_folder).denoiser.named_modules())
    assert len(names) == sum(name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0")) for name in layers)
    lora = sum(RANK * sum(layers[name].weight.shape) for name in names)
    assert {number[label] for label in ("lora", "deft", "deft-none", "peft-deft-qr")} == {lora}
    assert number["dora"] == lora + sum(layers[name].out_features for name in names)
    assert number["para"] == sum(RANK * layers[name].out_features for name in names)
    assert number["oft"] == pytest.approx(lora, rel=0.1)


@pytest.mark.parametrize("family", ["flux", "omnigen"])
def test_other_families(data, tmp_path, family):
    """FLUX.1's layers of q, k, v and output are those of its double blocks; OmniGen reads pictures beside the text."""
    model = small_omnigen.build(tmp_path) if family == "omnigen" else small_flux.build(tmp_path).folder
    settings = settings_of(data, model, tmp_path / "out")
    pictures = tuple(sorted((data / "dog").glob("*.jpg")))
    inputs, words = (pictures[:1], " like <img><|image_1|></img>") if family == "omnigen" else ((), "")
    rows = tuple(Row(one, f"a photo of sks dog{words}", inputs) for one in pictures)
    subject = Subject("dog", rows, (Asked(0, f"a sks dog{words}", "a sks dog", inputs=inputs),), pictures)
    training.check(settings, [subject])
    training.write_data(settings, subject)
    numbers, drawn = set(), []
    for label in ("lora", "deft"):
        one = Training(Method(label, 2, 1e-1, 1), subject, 0)
        numbers.add(training.train(settings, one)["parameters"])
        painter = Painter(settings, 7.5)
        with painter.using(training.file_of(settings, one)):
            drawn.append(painter.draw(subject.asked[0], 1).tobytes())
    drawn.append(painter.draw(subject.asked[0], 1).tobytes())
    assert len(numbers) == 1
    assert len(set(drawn)) == 3
    if inputs:
        others = replace(subject.asked[0], inputs=pictures[1:2])
        assert painter.draw(others, 1).tobytes() != drawn[-1], "it looks at the picture"
    names = {name.rsplit("attn.", 1)[1] for name in adapters.targets_of(painter.model.denoiser)}
    of_flux = {"add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"} if family == "flux" else set()
    assert names == {"to_q", "to_k", "to_v", "to_out.0"} | of_flux
    assert not any(name.startswith("single") for name in adapters.targets_of(painter.model.denoiser))


def test_an_adapter_in_a_model_of_less_precision_stays_float32(model_folder):
    """As the trainer places a model, in bfloat16."""
    model = loaded(model_folder)
    model.denoiser.bfloat16()
    adapter = adapters.PeftAdapter(adapters.config_of("lora")(2, adapters.targets_of(model.denoiser)), model.denoiser)
    values = [p.clone() for p in adapter.parameters()]
    model.denoiser.bfloat16()
    adapter.groups(training.run_of(settings_of(Path("."), model_folder, Path("."))).optimizer)
    assert all(torch.equal(p, value) for p, value in zip(adapter.parameters(), values, strict=True))
    assert {p.dtype for p in adapter.parameters()} == {torch.float32}


def test_adapters_can_be_turned_off(model_folder):
    model = loaded(model_folder)
    before = answer(model.denoiser)
    adapter = adapters.PeftAdapter(adapters.config_of("dora")(2, adapters.targets_of(model.denoiser)), model.denoiser)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    adapter.set_multiplier(0)
    assert torch.equal(answer(model.denoiser), before)
    adapter.set_multiplier(1)
    assert not torch.allclose(answer(model.denoiser), before)
    assert all(p.requires_grad for p in adapter.parameters())


@pytest.mark.parametrize(
    ("label", "told"),
    [("lorra", "did you mean 'lora'"), ("deft removal", "KEY=VALUE"), ("deft removal=2", "removal=2"),
     ("deft keep=x removal=1", "keep=x"), ("deft rmoval=1", "did you mean 'removal'")],
)  # fmt: skip
def test_a_wrong_adapter_is_one_line(label, told):
    with pytest.raises(DeftError, match=told) as error:
        network_args(label)
    assert label in str(error.value)
    assert "\n" not in str(error.value)


def test_every_named_adapter_is_one():
    for label in ADAPTERS:
        assert (network_args(label) is None) == (label in PEFT)


# --- pictures ---


def test_a_prompt_alone_is_that_of_a_full_run(settings, trained):
    """Bit for bit, whatever was drawn before, with another adapter in between."""
    prompts = [Asked(i, f"a sks dog {i}", "") for i in range(4)]
    full = Painter(settings, 7.5)
    files = [trained[label][2] for label in ("lora", "deft")]
    drawn = []
    for file in files:
        with full.using(file):
            drawn.append([full.draw(one, seed_of("dog", one.index, 0, 0)).tobytes() for one in prompts])
    alone = Painter(settings, 7.5)
    with alone.using(files[1]):
        assert alone.draw(prompts[3], seed_of("dog", 3, 0, 0)).tobytes() == drawn[1][3]
    assert len({picture for pictures in drawn for picture in pictures}) == 8


def test_seeds_are_what_they_are():
    """On every machine and in every version: pictures of half a run would not fit the other half."""
    assert seed_of("dog", 3, 0, 0) == 3753052744  # the first 8 digits of sha256 of dog|3|0|0
    several = {seed_of(s, i, k, seed) for s in ("dog", "dog1") for i in range(30) for k in range(4) for seed in (0, 1)}
    assert len(several) == 480
    assert max(several) < 2**32


def test_names_of_files_are_safe_and_never_shared():
    texts = ["lora", "deft removal=1", "deft  removal=1", r"deft keep=C:\keep.txt", "a/b", "a|b", "..", "käse",
             "x" * 90, "x" * 91, "rolls-royce_hood_ornament"]  # fmt: skip
    names = [name_of_file(text) for text in texts]
    assert len(set(names)) == len(texts)
    assert all(name.isascii() and not set(name) & set('\\/:*?"<>| ') and name[0] != "." for name in names)
    assert names[0], names[-1] == (texts[0], texts[-1])


# --- records ---


def test_half_a_line_is_passed_over_and_written_again(tmp_path):
    records = Records(tmp_path, "drawn")
    records.add({"a": 1})
    records.file.write_text(records.file.read_text() + '{"a": ')
    assert list(records.read()) == [{"a": 1}]
    records.add({"a": "ä"})
    assert list(records.read()) == [{"a": 1}, {"a": "ä"}]
    records.file.write_text('{"a": \n{"a": 2}\n')
    with pytest.raises(DeftError, match="line 1 is no JSON object"):
        list(records.read())


def test_records_of_several_processes_come_together(tmp_path):
    several = [Records(tmp_path, "drawn", i) for i in range(3)]
    for i, one in enumerate(several):
        one.add({"of": i})
    assert {tuple(sorted(one["of"] for one in records.read())) for records in several} == {(0, 1, 2)}
    several[0].gather()
    assert [file.name for file in tmp_path.iterdir()] == ["drawn.jsonl"]
    assert sorted(one["of"] for one in several[2].read()) == [0, 1, 2]


def test_pictures_are_scored_again_when_others_of_their_prompt_have_come(tmp_path):
    """Diversity is of all of a prompt's pictures; a metric that is new is computed too, and nothing else."""

    class Counting:
        choice = Choice(("clip_i", "div", "fid"))

        def scores(self, pictures):
            return [{"div": float(len(one.siblings))} for one in pictures]

    records = Records(tmp_path, "records")
    scores = Scores(records, Records(tmp_path, "scores"), tmp_path)
    asked = Asked(0, "a dog", "a dog", number=3)
    subject = Subject("dog", (), (asked,), (tmp_path / "real.jpg",))
    one = {"method": BASE, "subject": "dog", "index": 0, "seed": 0}
    for number in (1, 3):
        for k in range(number):
            if k or number == 1:
                records.add(one | {"k": k, "picture": f"{k}.png"})
        drawn = scores.drawn(subject, list(records.read()))
        left = scores.left(drawn, Counting.choice)
        assert len(left) == number
        scores.score(left, {}, Counting())
        assert scores.left(drawn, Counting.choice) == {}
    assert [(line["picture"], line["div"]) for line in scores.read()] == [(f"{k}.png", 2.0) for k in range(3)]
    assert len(scores.left(drawn, Choice(("clip_i", "dino")))) == 3
    assert drawn["1.png"] == Drawn(tmp_path / "1.png", (tmp_path / "real.jpg",), "a dog",
                                   (tmp_path / "0.png", tmp_path / "2.png"))  # fmt: skip


# --- processes ---


def test_shares_are_the_whole_and_do_not_overlap():
    for number in (1, 2, 7, 40):
        shares = [share(range(30), Alone(index, number)) for index in range(number)]
        assert sorted(one for part in shares for one in part) == list(range(30))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_wait_for_each_other():
    store, order = torch.distributed.HashStore(), []

    def work(index: int) -> None:
        together = Several(store, index, 3)
        for place in range(3):
            order.append(place)
            together.wait("place")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert order == sorted(order)


def test_two_processes_share_a_run_out(settings, monkeypatch):
    """No training and no picture is done by both, none by neither; though one is slower to begin."""
    done = []

    def train(settings, one):
        done.append(one.key)
        file = training.file_of(settings, one)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        return {"key": one.key, "method": one.method.key, "subject": one.subject.name, "file": file.name,
                "bytes": 0, "parameters": 1, "seconds": 1.0}  # fmt: skip

    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(Painter, "__init__", lambda *_: None)
    monkeypatch.setattr(Painter, "guidance", 7.5, raising=False)
    monkeypatch.setattr(Painter, "using", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(Painter, "draw", lambda *_: Image.new("RGB", (8, 8)))
    benchmark = dreambooth.benchmark_of(argparse.Namespace(token="sks"))
    settings, store = replace(settings, adapters=("lora", "deft"), seeds=2), torch.distributed.HashStore()
    rooms = [Room(benchmark, settings, Several(store, index, 2)) for index in (0, 1)]
    expected = [one.key for one in rooms[0].to_train(tuning=False)]

    def work(room):
        time.sleep(0.5 * room.together.index)
        room.train(False)
        room.together.wait("trained")
        time.sleep(0.5 * room.together.index)
        room.generate(False)

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(work, rooms))
    assert sorted(done) == sorted(expected)
    for name in ("trainings", "records"):
        numbers = [
            len((settings.output / file).read_text().splitlines()) for file in (f"{name}.jsonl", f"{name}.1.jsonl")
        ]
        assert numbers[0] > 0
        assert numbers[1] > 0
    pictures = [record["picture"] for record in rooms[0].drawn.read()]
    assert len(set(pictures)) == len(pictures)
    # two subjects from two seeds by the base model and two methods: 3 kinds of prompts of objects, 4 of what lives
    # (two of each, but one for the class)
    assert len(pictures) == 2 * 3 * ((2 * 2 + 1) + (3 * 2 + 1))
    assert not rooms[0].missing(False)


def test_a_training_that_fails_by_its_rate_is_recorded_and_no_other(settings, monkeypatch):
    subject = Subject("dog", (Row(settings.data / "dog" / "00.jpg", "sks"),), (), ())
    training.write_data(settings, subject)
    one = Training(Method("lora", RANK, 1e-3, 1), subject, 0)

    def stopped(reason):
        def train(run, adapter_of):
            model = loaded(settings.model)
            adapter_of(run.network, None, model, None, settings.output)
            raise TrainingStopped(reason)

        return train

    monkeypatch.setattr(training.train_network_deft, "train", stopped("stopped at step 9: non-finite loss nan"))
    record = training.train(settings, one)
    assert record["failed"].startswith("stopped at step 9")
    assert "file" not in record
    monkeypatch.setattr(training.train_network_deft, "train", stopped("x.safetensors: not written (No space left)"))
    with pytest.raises(TrainingStopped, match="No space left"):
        training.train(settings, one)


# --- the choice of rates ---


def means(**values: tuple[float, float]) -> dict[str, dict[str, float]]:
    return {name: {"dino": dino, "clip_t": text} for name, (dino, text) in values.items()}


def methods(*rates: float) -> list[Method]:
    return [Method("lora", 4, rate, 10) for rate in rates]


def test_the_best_rate_is_the_likest_that_still_follows_the_text():
    criterion = Criterion.of(("clip_t", "dino", "clip_i"))
    assert criterion == Criterion("dino", "clip_t")
    low, middle, high = methods(0.1, 0.2, 0.3)
    base = means(base=(0.2, 0.3))
    found = base | dict(zip((m.key for m in (low, middle, high)),
                            means(a=(0.4, 0.30), b=(0.6, 0.275), c=(0.9, 0.26)).values(), strict=True))  # fmt: skip
    assert criterion.best([low, middle, high], found) == {"lora": middle}
    found |= {middle.key: {"dino": 0.6, "clip_t": 0.26}, low.key: {"dino": 0.4, "clip_t": 0.265}}
    assert criterion.best([low, middle, high], found) == {"lora": low}, "none follows well: the best of them"
    assert criterion.best([high], base) == {}
    alone = Criterion.of(("rmse",))
    worse, better = {"rmse": 9.0}, {"rmse": 3.0}
    assert alone.best([low, high], {low.key: worse, high.key: better}) == {"lora": high}, "less is better"
    assert Criterion.of(("fid", "pres")) is None


def test_rates_are_compared_on_the_same_pictures(settings):
    """A rate that came later, with fewer prompts: the others' further pictures do not count."""
    room = Room(dreambooth.benchmark_of(argparse.Namespace(token="sks")), settings, Alone())
    prompts = [asked.index for asked in room.subjects[0].asked if asked.index < dreambooth.PROMPTS]
    room.settings = replace(settings, rates=(1e-4, 1e-3))
    room.criterion = Criterion.of(("dino",))
    base, low, high = BASE, *(method.key for method in room.methods())
    for method, index, dino in [(base, i, 0.0) for i in prompts] + [(low, i, 0.5) for i in prompts] + [
        *((high, i, 0.4) for i in prompts), *((high, 90 + i, 0.9) for i in prompts)]:  # fmt: skip
        name = f"{method}-{index}"
        room.drawn.add({"picture": name, "method": method, "subject": "can", "index": index, "k": 0, "seed": 0})
        room.scores.lines.add({"picture": name, "dino": dino, "of": ["dino"]})
    assert room.chosen()["deft"].key == low


def test_means_count_each_subject_once():
    scores = [{"method": BASE, "subject": "a", "dino": 1.0}] * 3 + [{"method": BASE, "subject": "b", "dino": 0.0}]
    scores += [{"method": BASE, "subject": "c", "dino": 9.0}, {"method": "x", "subject": "a"}]
    assert choosing.means_of(scores, ["a", "b"], ("dino",)) == {BASE: {"dino": 0.5}}


# --- the command line ---


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rank", "0"), "--rank 0: give at least 1"),
        (("--rates", "-1"), "--rates"),
        (("--guidance", "nan"), "--guidance nan: give 0 or more"),
        (("--adapters", "lora", "loar"), "did you mean 'lora'"),
        (("--rats", "1"), "unrecognized arguments: --rats"),
        (("--model", "nowhere"), "no such model: nowhere"),
        (("--data", "nowhere"), "has no prompts_and_classes.txt"),
        (("--clip", "nowhere"), "--clip nowhere"),
        (("--config", "nowhere.toml"), "nowhere.toml"),
        (("--rates", "1e-3", "1e-4"), "to choose the best of several"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(data, model_folder, tmp_path, capsys, options, told):
    argv = ["--data", str(data), "--model", str(model_folder), "--output", str(tmp_path / "out"), "--rates", "1e-3"]
    assert dreambooth.main([*argv, *options]) == 2
    out, error = capsys.readouterr()
    assert error.startswith("error: ")
    assert told in error
    assert error.count("\n") == 1
    assert not out
    assert not (tmp_path / "out" / "adapters").exists()


@pytest.mark.parametrize("inputs", [(), (Path("a.jpg"),)])
def test_a_trainers_file_may_add_options_but_not_decide(data, model_folder, tmp_path, inputs):
    file = tmp_path / "more.toml"
    file.write_text(
        'output_dir = "elsewhere"\nmax_train_epochs = 3\nunet_lr = 1.0\nlr_scheduler = "cosine"\nnetwork_dim = 99\n'
        "lr_warmup_steps = 3\n"
        'save_every_n_steps = 1\nsave_state = true\nmin_snr_gamma = 5.0\nmixed_precision = "bf16"\n'
        'sample_every_n_steps = 1\nnetwork_args = ["removal=1"]\ntrain_data_dir = "elsewhere"\n'
    )
    subject = Subject("dog", (Row(data / "dog" / "00.jpg", "sks", inputs),), (), ())
    settings = replace(settings_of(data, model_folder, tmp_path / "out"), config=file, precision=None)
    run = training.run_of(settings, training._options(settings, Training(Method("deft", 4, 1e-3, 7), subject, 5)))
    assert run.objective.min_snr_gamma == 5
    assert run.optimizer.lr_warmup_steps == 0
    assert run.process.mixed_precision == "bf16"
    assert run.process.seed == 5
    assert (run.loop.max_train_steps, run.loop.max_train_epochs, run.loop.sample_every_n_steps) == (7, None, None)
    assert (run.optimizer.learning_rate, run.optimizer.unet_lr, run.optimizer.lr_scheduler) == (1e-3, 1e-3, "constant")
    assert run.network.network_dim == run.network.network_alpha == 4
    assert set(run.network.network_args) == set(adapters.LAYERS)
    assert (run.saves.save_every_n_steps, run.saves.save_state) == (None, False)
    assert run.saves.output_dir == str(tmp_path / "out" / "adapters")
    [subset] = run.data.datasets[0].subsets
    assert (subset.train_jsonl or subset.metadata_file) == str(training.data_of(settings, subject))


def test_a_trainers_file_is_found_without_its_ending(data, model_folder, tmp_path):
    (tmp_path / "more.toml").write_text("min_snr_gamma = 5.0\n")
    argv = ["--data", data, "--model", model_folder, "--output", tmp_path / "out", "--rates", "1e-3", "--device", "cpu",
            "--stage", "prepare", "--limit_subjects", "1", "--config", tmp_path / "more"]  # fmt: skip
    assert dreambooth.main(list(map(str, argv))) == 0
    assert "min_snr_gamma" in (tmp_path / "out" / "manifest.json").read_text()


def test_help_needs_nothing_heavy():
    code = (
        "import sys\nfrom benchmarks import dreambooth\ntry: dreambooth.main(['--help'])\nexcept SystemExit: pass\n"
        "print({'torch', 'diffusers', 'peft', 'transformers'} & set(sys.modules))"
    )
    root = Path(__file__).resolve().parents[1]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert found.strip().endswith("set()")
    assert "--images_per_prompt" in found
