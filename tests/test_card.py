"""The page about a file: what the Hub, Civitai and diffusers make of it, and what it does not tell."""

from __future__ import annotations

import getpass
import re
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from networks import convert_deft, deft_card, deft_pictures, deft_sharing
from tests.test_sharing import metadata_of

METADATA = {
    "ss_base_model_version": "sdxl_base_v1-0", "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.title": "Sks | cat", "modelspec.trigger_phrase": "sks cat", "modelspec.tags": "cat, animal, lora",
    "modelspec.license": "CC0-1.0", "modelspec.description": "A *fluffy* cat.\n\nSits.", "ss_network_dim": "8",
    "ss_dataset_dirs": '{"10_sks cat": {"n_repeats": 10, "img_count": 5}, "x": {"n_repeats": 1, "img_count": 2}}',
    "ss_steps": "300", "ss_unet_lr": "None", "deft_version": "0.3.0", "ss_sd_model_name": "sdxl.safetensors",
}  # fmt: skip


@pytest.fixture
def lora(tmp_path):
    path = tmp_path / "cat.safetensors"
    save_file({"lora_unet_a.lora_up.weight": torch.randn(4, 4)}, str(path), METADATA)
    return path


@pytest.fixture
def shot(tmp_path):
    path = tmp_path / "elsewhere" / "shot.png"
    path.parent.mkdir()
    Image.new("RGB", (64, 48), "red").save(path)
    return path


def test_the_hub_reads_what_diffusers_scripts_give_it(lora, shot):
    """By the Hub's own class, which reads the metadata and checks its kinds."""
    deft_card.write(lora, METADATA, shot, 'sks cat: "at sea" # it\'s')
    card = ModelCard.load(lora.with_suffix(".README.md"))
    data = card.data.to_dict()
    assert data["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0"
    assert (data["library_name"], data["license"], data["pipeline_tag"]) == ("diffusers", "cc0-1.0", "text-to-image")
    assert data["instance_prompt"] == "sks cat"
    assert data["widget"] == [{"text": 'sks cat: "at sea" # it\'s', "output": {"url": "cat.png"}}]
    assert {"text-to-image", "diffusers", "lora", "template:sd-lora", "stable-diffusion-xl", "cat"} <= set(data["tags"])
    assert len(data["tags"]) == len(set(data["tags"]))
    assert lora.with_suffix(".png").read_bytes() == shot.read_bytes()


def test_the_page_says_what_the_file_says(lora):
    text = deft_card.page(lora, METADATA)
    for row in ("| trigger | `sks cat` |", "| base model | SDXL 1.0 |", "| strength | 1 |", "| pictures | 7 |",
                "| steps | 300 |", "| rank (network_dim) | 8 |", "| licence | CC0-1.0 |"):  # fmt: skip
        assert row in text
    assert "# Sks \\| cat\n" in text
    assert "A *fluffy* cat.\n\nSits." in text
    assert "None" not in text
    for name, value in deft_sharing.hashes_of(lora).items():
        assert f"| {name} | `{value}` |" in text
    assert "widget" not in text
    unknown = deft_card.page(lora, {})
    assert "base_model" not in unknown
    assert "license" not in unknown
    assert "| licence | not stated |" in unknown
    assert "```" not in unknown


@pytest.mark.parametrize(
    ("licence", "front"),
    [("MIT", 'license: "mit"'), ("My own\nwords", 'license: other\nlicense_name: "My own words"')],
)
def test_a_licence_has_the_hubs_name_or_its_own(lora, licence, front):
    assert front in deft_card.page(lora, METADATA | {"modelspec.license": licence})


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@settings(deadline=None, max_examples=40)
@given(text, text, text, text)
def test_whatever_the_words_are_the_page_can_be_read(tmp_path_factory, trigger, title, tags, prompt):
    path = tmp_path_factory.mktemp("x") / "cat.safetensors"
    save_file({"lora_unet_a.lora_up.weight": torch.zeros(1)}, str(path))
    metadata = METADATA | {
        "modelspec.trigger_phrase": trigger, "modelspec.title": title, "modelspec.tags": tags,
    }  # fmt: skip
    page = deft_card.page(path, metadata, "cat.png", prompt)
    data = ModelCard(page).data.to_dict()
    if trigger.isprintable():
        assert data.get("instance_prompt", "") == " ".join(trigger.split())
    if tags.isprintable():
        assert set(map(str.strip, " ".join(tags.split()).split(","))) - {""} <= set(data["tags"])
    (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    compile(code, "page", "exec")


def test_the_code_on_it_runs_and_the_adapter_works(model_folder, shot, tmp_path, run, monkeypatch):
    """As it stands, but for the base model, which is the small one, and the device."""
    assert run(learning_rate=1e-2, model_card=True) == 0
    folder = tmp_path / "out"
    page = (folder / "cat.README.md").read_text(encoding="utf-8")
    (code,) = re.findall("```python\n(.*?)```", page, re.DOTALL)
    base = "'stable-diffusion-v1-5/stable-diffusion-v1-5'"
    for there, here in ((base, repr(str(model_folder))), ("float16", "float32"), ("'cuda'", "'cpu'")):
        assert there in code
        code = code.replace(there, here)
    call = "pipe('sks cat'"
    assert call in code
    code = code.replace(call, f"{call}, num_inference_steps=2, height=64, width=64, generator=torch.manual_seed(0)")
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(compile(code, "page", "exec"), names)
    drawn = (folder / "picture.png").read_bytes()
    names["pipe"].set_adapters("lora", 0.0)
    exec(compile(code.splitlines()[-1], "page", "exec"), names)
    assert (folder / "picture.png").read_bytes() != drawn


def test_omnigens_page_has_the_loader_that_there_is(lora):
    text = deft_card.page(lora, {"ss_base_model_version": "omnigen1", "deft_version": "0.3.0"})
    assert "create_network_from_weights(1.0, 'cat.safetensors', None, [], pipe.transformer" in text
    assert "Automatic1111" not in text


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("lora_unet_a.lora_up.weight", {"Automatic1111", "ComfyUI", "diffusers,"}),
        ("unet.a.lora_A.weight", {"ComfyUI", "diffusers,"}),
        ("diffusion_model.a.lora_up.weight", {"ComfyUI"}),
        ("lora_unet_a.deft_P", {"convert_deft.py"}),
    ],
)
def test_it_names_the_programs_that_read_this_form(tmp_path, key, named):
    path = tmp_path / "cat.safetensors"
    save_file({key: torch.zeros(1)}, str(path), METADATA)
    use = deft_card.page(path, METADATA).partition("## Use")[2].partition("## Training")[0]
    assert {one for one in ("Automatic1111", "ComfyUI", "diffusers,", "convert_deft.py") if one in use} == named


def test_what_a_person_has_written_stays_and_our_own_is_made_anew(lora):
    page = lora.with_suffix(".README.md")
    deft_card.write(lora, METADATA, None)
    first = page.read_text(encoding="utf-8")
    deft_card.write(lora, METADATA | {"modelspec.title": "Other"}, None)
    assert "# Other" in page.read_text(encoding="utf-8")
    for theirs in (first.replace("fluffy", "bald"), "# my page\n", "", first + "more", "\ud800"):
        page.write_bytes(theirs.encode("utf-8", "surrogatepass"))
        before = page.read_bytes()
        (told,) = deft_card.write(lora, METADATA, None)
        assert "stays as it is" in told
        assert page.read_bytes() == before


def test_it_tells_nothing_of_the_disk(lora, shot, run, tmp_path):
    """A training's file and page, but for what the author says; user names as in home folders."""
    (tmp_path / "p.txt").write_text("sks cat --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    assert run(sample_prompts=tmp_path / "p.txt", sample_every_n_steps=2, model_card=True, sidecars=True) == 0
    for name in ("cat.README.md", "cat.json", "cat.metadata.json"):
        text = (tmp_path / "out" / name).read_text(encoding="utf-8")
        assert str(tmp_path) not in text
        assert tmp_path.name not in text
        assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", text)


def test_the_tool_writes_it_too(lora, shot, tmp_path, capsys):
    page = tmp_path / "cat.README.md"
    assert convert_deft.main([str(lora), "--model_card"]) == 0
    assert "| trigger | `sks cat` |" in page.read_text(encoding="utf-8")
    out = tmp_path / "new.safetensors"
    command = [str(lora), "--save_to", str(out), "--set", "trigger=xyz", "--set", f"preview={shot}", "--model_card"]
    assert convert_deft.main(command) == 0
    text = out.with_suffix(".README.md").read_text(encoding="utf-8")
    assert "| trigger | `xyz` |" in text
    assert '    url: "new.png"' in text
    assert deft_pictures.COVER in metadata_of(out)
    assert convert_deft.main([str(lora), "--to", "peft", "--save_to", str(tmp_path / "p"), "--model_card"]) == 2
    assert "--model_card: a peft folder has none" in capsys.readouterr().err
