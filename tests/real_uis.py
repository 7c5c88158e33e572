"""What UIs' own code shows of an adapter file: Forge's cards, ComfyUI's previews, ComfyUI-Lora-Manager's metadata.

Their files are loaded from a checkout each; what they import of the program around them is a stand-in.
"""

from __future__ import annotations

import ast
import asyncio
import base64
import contextlib
import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

from PIL import Image


@dataclass(frozen=True)
class Shown:
    """What a UI shows of a file; None where it has no such thing."""

    name: str | None = None
    picture: Image.Image | None = None
    trigger: Any = None
    strength: float | None = None
    model: str | None = None
    tags: list[tuple[str, int]] | None = None
    description: str | None = None
    hash: str | None = None


@contextlib.contextmanager
def _around(stand_ins: Mapping[str, Any], *paths: Path) -> Iterator[None]:
    """Modules that are imported within it see the stand-ins, and are forgotten behind it."""
    before, places = dict(sys.modules), list(sys.path)
    for name in {one.split(".")[0] for one in stand_ins}:
        for known in [one for one in sys.modules if one == name or one.startswith(f"{name}.")]:
            del sys.modules[known]
    sys.modules.update(stand_ins)
    sys.path[:0] = map(str, paths)
    try:
        yield
    finally:
        sys.path[:] = places
        for name in set(sys.modules) - set(before):
            del sys.modules[name]
        sys.modules.update(before)


def _function(file: Path, name: str, **names: Any) -> Any:
    """One function of a file whose imports are many."""
    (found,) = (
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name == name
    )
    exec(compile(ast.Module([found], []), str(file), "exec"), names)
    return names[name]


def _package(name: str, folder: Path, **values: Any) -> ModuleType:
    made = ModuleType(name)
    made.__path__ = [str(folder)]
    vars(made).update(values)
    return made


def shown_by_forge(program: Path, file: Path) -> Shown:
    """Its page of cards (modules/ui_extra_networks.py, sd_forge_lora/) on a file in a folder of LoRAs."""
    lora = program / "extensions-builtin" / "sd_forge_lora"
    listed: dict[str, Any] = {}
    networks = SimpleNamespace(
        available_networks=listed, available_network_hash_lookup={}, forbidden_network_aliases={}
    )
    shared = SimpleNamespace(
        cmd_opts=SimpleNamespace(lora_dir=str(file.parent), no_hashing=False),
        opts=SimpleNamespace(samples_format="png", lora_preferred_name="Alias from file"),
        html=lambda name: "",
    )
    read = _function(program / "modules" / "sd_models.py", "read_metadata_from_safetensors", errors=MagicMock())
    inner = {
        "shared": shared,
        "sd_models": SimpleNamespace(read_metadata_from_safetensors=read),
        "cache": SimpleNamespace(cached_data_for_file=lambda kind, title, name, made: made()),
        "hashes": SimpleNamespace(sha256_from_cache=lambda *a, **k: None),
        **{name: MagicMock() for name in ("errors", "images", "infotext_utils", "sysinfo", "paths_internal")},
    }
    stand_ins = {
        "gradio": MagicMock(), "fastapi": MagicMock(), "fastapi.exceptions": MagicMock(), "networks": networks,
        "modules": _package("modules", program / "modules", **inner),
        **{f"modules.{name}": value for name, value in inner.items()},
    }  # fmt: skip
    with _around(stand_ins, lora):
        network = importlib.import_module("network")
        page = importlib.import_module("ui_extra_networks_lora").ExtraNetworksPageLora()
        editor = importlib.import_module("ui_edit_user_metadata")
        listed[file.stem] = on_disk = network.NetworkOnDisk(file.stem, str(file))
        item = page.create_item(file.stem, 0)
        fields = item["user_metadata"]
        preview = item["preview"]
        if preview and "cover-images" in preview:
            content = base64.b64decode(json.loads(on_disk.metadata["ssmd_cover_images"])[0])
        else:
            content = Path(_path_of(preview)).read_bytes() if preview else b""
        return Shown(
            name=on_disk.get_alias(),
            picture=Image.open(io.BytesIO(content)) if content else None,
            trigger=fields.get("activation text"),
            strength=fields.get("preferred weight"),
            model=item.get("sd_version") or on_disk.sd_version.name,
            tags=editor.build_tags(on_disk.metadata),
            description=item["description"],
            hash=on_disk.shorthash,
        )


def _path_of(preview: str) -> str:
    """Of the address under which Forge's page asks for it."""
    from urllib.parse import parse_qs, urlsplit

    return parse_qs(urlsplit(preview).query)["filename"][0]


def shown_by_comfyui(program: Path, file: Path) -> tuple[list[Image.Image], dict[str, str] | None]:
    """Its model library's pictures (app/model_manager.py), and the metadata that its server hands on (server.py)."""
    header = _function(program / "comfy" / "utils.py", "safetensors_header", struct=importlib.import_module("struct"))
    comfy = _package("comfy", program, utils=SimpleNamespace(safetensors_header=header))
    folder_paths = SimpleNamespace(
        map_legacy=None,
        filter_files_extensions=None,
        filter_files_content_types=lambda files, kinds: [
            one for one in files if one.endswith((".png", ".jpg", ".jpeg", ".webp"))
        ],
    )
    stand_ins = {"comfy": comfy, "comfy.utils": comfy.utils, "aiohttp": MagicMock(), "folder_paths": folder_paths}
    with _around(stand_ins):
        spec = importlib.util.spec_from_file_location("model_manager", program / "app" / "model_manager.py")
        assert spec
        assert spec.loader
        code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
        found = [Image.open(one).convert("RGB") for one in code.ModelFileManager().get_model_previews(str(file))]
    handed = header(str(file), max_size=1024 * 1024)  # as /view_metadata calls it
    return found, None if handed is None else json.loads(handed)["__metadata__"]


def shown_by_the_manager(program: Path, file: Path) -> Shown:
    """ComfyUI-Lora-Manager's own reading of what stands beside a file (py/utils/metadata_manager.py)."""
    settings = SimpleNamespace(get=lambda name, default=None: default)
    stand_ins = {
        "py": _package("py", program / "py"),
        "py.services": _package("py.services", program / "py" / "services"),
        "py.services.settings_manager": SimpleNamespace(get_settings_manager=lambda: settings),
        "piexif": MagicMock(),
    }
    with _around(stand_ins):
        manager = importlib.import_module("py.utils.metadata_manager").MetadataManager
        words = importlib.import_module("py.utils.lora_metadata").extract_trained_words
        files = importlib.import_module("py.utils.file_utils")
        found, skipped = asyncio.run(manager.load_metadata(str(file)))
        assert not skipped
        tags, _ = asyncio.run(words(str(file)))
        assert asyncio.run(files.calculate_sha256(str(file))) == found.sha256
        assert files.calculate_autov3(str(file)) == found.autov3
    return Shown(
        name=found.model_name,
        picture=Image.open(found.preview_url) if found.preview_url else None,
        trigger=found.civitai.get("trainedWords"),
        strength=json.loads(found.usage_tips).get("strength"),
        model=found.base_model,
        tags=tags,
        description=found.modelDescription,
        hash=found.autov3,
    )
