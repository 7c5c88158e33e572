"""A page about an adapter file, for Civitai and as README.md of a repository on Hugging Face's Hub.

What stands between its lines `---` is the Hub's metadata (its docs/hub/model-cards.md), with the keys that diffusers'
training scripts give to a LoRA (`load_or_create_model_card`, diffusers 0.42). All of it comes from the file: no folder
of a disk is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from networks import deft_io, deft_sharing
from networks.deft_config import DeftError, reason_of
from networks.deft_sharing import FRIENDLY

ENDING = ".README.md"
MARK = "<!-- made by deft_card.py, and made anew as long as nobody changes it: "
# licences that the Hub knows by these names (its docs/hub/repositories-licenses.md); others are "other" there
LICENSES = (
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "openrail++", "afl-3.0",
    "artistic-2.0", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5",
    "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0",
    "cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0",
    "agpl-3.0", "gpl", "gpl-2.0", "gpl-3.0", "lgpl", "lgpl-2.1", "lgpl-3.0", "isc", "mpl-2.0", "unlicense", "wtfpl",
    "zlib", "unknown",
)  # fmt: skip
TAGS = {  # of diffusers' scripts, beside those of every LoRA
    "SD 1.5": ("stable-diffusion", "stable-diffusion-diffusers"),
    "SD 2.1": ("stable-diffusion", "stable-diffusion-diffusers"),
    "SDXL 1.0": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "Flux.1 D": ("flux", "flux-diffusers"),
    "Flux.1 S": ("flux", "flux-diffusers"),
}
# what a table of settings has, where the file says it
SETTINGS = {
    "steps": ("ss_steps",),
    "epochs": ("ss_epoch",),
    "rank (network_dim)": ("ss_network_dim",),
    "alpha": ("ss_network_alpha",),
    "resolution": ("modelspec.resolution", "ss_resolution"),
    "batch size": ("ss_batch_size_per_device",),
    "gradient accumulation": ("ss_gradient_accumulation_steps",),
    "learning rate": ("ss_learning_rate",),
    "learning rate of the denoiser": ("ss_unet_lr",),
    "learning rate of the text encoders": ("ss_text_encoder_lr",),
    "schedule": ("ss_lr_scheduler",),
    "optimizer": ("ss_optimizer",),
    "precision": ("ss_mixed_precision",),
    "seed": ("ss_seed",),
    "clip skip": ("ss_clip_skip",),
}


@dataclass(frozen=True)
class _Facts:
    """:param name: of the file, without its extension
    :param picture: the file's name of the one beside it, "" for none
    :param prompt: what is shown with the picture
    :param keys: of its tensors
    """

    name: str
    keys: tuple[str, ...]
    metadata: Mapping[str, str]
    picture: str
    prompt: str
    hashes: Mapping[str, str]

    def said(self, *keys: str) -> str:
        """What the file says under the first key that it has, on one line."""
        found = (_on_one_line(self.metadata.get(key, "")) for key in keys)
        return next((value for value in found if value not in ("", "None", "[]", "False")), "")

    @property
    def base(self) -> deft_sharing.Base:
        return deft_sharing.base_of(self.metadata)

    @property
    def trigger(self) -> str:
        return self.said(FRIENDLY["trigger"])

    @property
    def strength(self) -> float:
        return deft_sharing.strength_of(self.metadata) or 1.0

    @property
    def asked(self) -> str:
        """A prompt that works."""
        return self.prompt or self.trigger


def write(path: Path, metadata: Mapping[str, str], picture: Path | None, prompt: str = "") -> list[str]:
    """Writes NAME.README.md beside a file, and its picture, where there is one and none is there yet.

    A page that somebody has changed or written stays.

    :param picture: as `deft_sharing.write_sidecars` takes it
    :param prompt: that the picture was drawn with; "" for the trigger
    :returns: what was written or stays, a line each
    :raises DeftError: for a failing disk, or a page that cannot be read
    """
    target = path.with_suffix(ENDING)
    shown, is_new = deft_sharing.write_picture(path, metadata, picture)
    lines = [f"{shown}: the preview"] if is_new else []
    if target.exists() and not _is_as_made(target):
        return [*lines, f"{target}: stays as it is, since somebody has written it; remove it for a new one"]
    text = page(path, metadata, shown.name if shown else "", prompt)
    deft_io.write_whole(target, text.encode())
    return [*lines, f"{target}: for Civitai, and README.md of a repository on the Hub"]


def page(path: Path, metadata: Mapping[str, str], picture: str = "", prompt: str = "") -> str:
    """The text of the page of a file that is there.

    :param picture: its file's name
    :raises DeftError: when the file cannot be read
    """
    hashes = deft_sharing.hashes_of(path)
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    keys = tuple(key for key in header if key != "__metadata__")
    facts = _Facts(path.stem, keys, metadata, picture, _on_one_line(prompt), hashes)
    parts = (_front(facts), _head(facts), _use(facts), _training(facts), _hashes(facts))
    text = "\n".join(line for part in parts for line in part)
    return f"{text}\n\n{_mark(text)}\n"


def _mark(text: str) -> str:
    return f"{MARK}{hashlib.sha256(text.encode()).hexdigest()[:16]} -->"


def _is_as_made(page: Path) -> bool:
    try:
        text, mark, _ = page.read_text(encoding="utf-8").rpartition(MARK)
        last = page.read_text(encoding="utf-8").strip().split("\n")[-1]
    except UnicodeDecodeError:
        return False
    except OSError as error:
        raise DeftError(f"{page}: is there and cannot be read ({reason_of(error)})") from None
    return bool(mark) and last == _mark(text.removesuffix("\n\n"))


def _front(facts: _Facts) -> Iterator[str]:
    """The Hub's metadata; a value in JSON is one in YAML."""
    yield "---"
    if facts.base.hub:
        yield f"base_model: {_quoted(facts.base.hub)}"
        yield "base_model_relation: adapter"
    yield "library_name: diffusers"
    yield "pipeline_tag: text-to-image"
    license = facts.said(FRIENDLY["license"])
    if license.lower() in LICENSES:
        yield f"license: {_quoted(license.lower())}"
    elif license:
        yield "license: other"
        yield f"license_name: {_quoted(license)}"
    yield "tags:"
    own = [word.strip() for word in facts.said(FRIENDLY["tags"]).split(",") if word.strip()]
    for tag in dict.fromkeys(["text-to-image", "diffusers", "lora", "template:sd-lora", *_tags(facts), *own]):
        yield f"- {_quoted(tag)}"
    if facts.trigger:
        yield f"instance_prompt: {_quoted(facts.trigger)}"
    if facts.picture:
        yield "widget:"
        yield f"- text: {_quoted(facts.asked or ' ')}"
        yield "  output:"
        yield f"    url: {_quoted(facts.picture)}"
    yield "---"
    yield ""


def _tags(facts: _Facts) -> tuple[str, ...]:
    return TAGS.get(facts.base.manager, ())


def _on_one_line(text: str) -> str:
    """With printable letters alone, since YAML has no others."""
    return "".join(letter for letter in " ".join(text.split()) if letter.isprintable()).strip()


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _head(facts: _Facts) -> Iterator[str]:
    yield f"# {_escaped(facts.said(FRIENDLY['title']) or facts.name)}"
    yield ""
    description = map(_on_one_line, facts.metadata.get(FRIENDLY["description"], "").strip().split("\n"))
    yield from description
    yield ""
    if facts.picture:
        yield f"![{_escaped(facts.asked or facts.name)}](<{facts.picture}>)"
        yield ""
    trained_on = facts.said("ss_sd_model_name")
    rows = {
        "trigger": _code(facts.trigger),
        "base model": facts.base.manager if facts.base is not deft_sharing.UNKNOWN else "",
        "trained on": _escaped(trained_on),
        "strength": f"{facts.strength:g}",
        "hint": _escaped(facts.said(FRIENDLY["usage_hint"])),
        "made of": _escaped(facts.said(FRIENDLY["merged_from"])),
        "author": _escaped(facts.said(FRIENDLY["author"])),
        "licence": _escaped(facts.said(FRIENDLY["license"])) or "not stated",
    }
    yield from _table(rows)


def _use(facts: _Facts) -> Iterator[str]:
    """For the programs that read the file's names (docs/clients.md)."""
    file, prompt = f"{facts.name}.safetensors", facts.asked
    yield "## Use"
    yield ""
    if any(".deft_P" in key for key in facts.keys):
        made = f"python networks/convert_deft.py {file} --base MODEL --save_to {facts.name}_lora.safetensors"
        yield f"No program reads this form. {_code(made)} makes a LoRA of it for a model."
        yield ""
        return
    if facts.base.hub.startswith("Shitao/"):
        yield from _omnigen(facts)
        return
    of_kohya = all(key.startswith("lora_") for key in facts.keys)
    if of_kohya:
        asked = f"{prompt} <lora:{facts.name}:{facts.strength:g}>".strip()
        yield f"Automatic1111, Forge: put {_code(file)} into `models/Lora`, and write {_code(asked)}."
        yield ""
    yield (
        f"ComfyUI: put it into `models/loras`, add the node Load LoRA with {facts.strength:g} for both strengths"
        f"{f', and write {_code(prompt)}' if prompt else ''}."
    )
    yield ""
    if facts.base.hub and (of_kohya or not any(key.startswith("diffusion_model.") for key in facts.keys)):
        yield from _diffusers(facts)


def _diffusers(facts: _Facts) -> Iterator[str]:
    dtype = "bfloat16" if facts.base.webui == "Flux" else "float16"
    yield "diffusers, where the file lies in the folder `.`, or in a repository of the Hub:"
    yield ""
    yield from _python(
        "import torch",
        "from diffusers import AutoPipelineForText2Image",
        "",
        f"pipe = AutoPipelineForText2Image.from_pretrained({facts.base.hub!r}, torch_dtype=torch.{dtype}).to('cuda')",
        f"pipe.load_lora_weights('.', weight_name={f'{facts.name}.safetensors'!r}, adapter_name='lora')",
        f"pipe.set_adapters('lora', {facts.strength!r})",
        f"pipe({facts.asked!r}).images[0].save('picture.png')",
    )


def _omnigen(facts: _Facts) -> Iterator[str]:
    """For which no UI and no loader of diffusers has names."""
    file = f"{facts.name}.safetensors"
    yield "In diffusers, with `networks/` of the trainer that made it:"
    yield ""
    yield from _python(
        "import torch",
        "from diffusers import OmniGenPipeline",
        "from networks import deft",
        "",
        f"pipe = OmniGenPipeline.from_pretrained({facts.base.hub!r}, torch_dtype=torch.bfloat16).to('cuda')",
        f"lora, _ = deft.create_network_from_weights({facts.strength!r}, {file!r}, None, [], pipe.transformer, "
        f"for_inference=True)",
        "lora.apply_to([], pipe.transformer)",
        f"lora.load_weights({file!r})",
        "lora.to('cuda')",
        f"pipe({facts.asked!r}).images[0].save('picture.png')",
    )


def _python(*lines: str) -> Iterator[str]:
    yield "```python"
    yield from lines
    yield "```"
    yield ""


def _training(facts: _Facts) -> Iterator[str]:
    rows = {label: _escaped(facts.said(*keys)) for label, keys in SETTINGS.items()}
    rows["pictures"] = _pictures(facts.metadata.get("ss_dataset_dirs", ""))
    version = facts.said(deft_io.VERSION_KEY)
    rows["trained with"] = f"DEFT {_escaped(version)}" if version else ""
    if any(rows.values()):
        yield "## Training"
        yield ""
        yield from _table(rows)


def _pictures(folders: str) -> str:
    """How many there are, each counted once."""
    try:
        return str(sum(int(folder["img_count"]) for folder in json.loads(folders).values()) or "")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return ""


def _hashes(facts: _Facts) -> Iterator[str]:
    yield "## Hashes"
    yield ""
    yield from _table({name: _code(value) for name, value in facts.hashes.items()})


def _table(rows: Mapping[str, str]) -> Iterator[str]:
    yield "| | |"
    yield "|---|---|"
    for label, value in rows.items():
        if value:
            yield f"| {label} | {value} |"
    yield ""


def _code(text: str) -> str:
    """In letters of one width, whatever is in it; in a table too."""
    if not text:
        return ""
    fence = "``" if "`" in text else "`"
    inner = f" {text} " if fence == "``" else text
    return f"{fence}{inner}{fence}".replace("|", "\\|")


def _escaped(text: str) -> str:
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>|#" else letter for letter in text)
