"""CLIP-I, CLIP-T, DINOv1 and DINOv2 beside DreamBench++'s own metrics/, run on the same pictures and small models.

DREAMBENCH_PLUS_DIR=... DINO_DIR=... pytest tests/integration/test_dreambench_plus_scores.py -s

Checkouts of yuangpeng/dreambench_plus and facebookresearch/dino; pip install torchvision fire megfile loguru pendulum
"""

from __future__ import annotations

import functools
import importlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

DREAMBENCH, DINO = os.environ.get("DREAMBENCH_PLUS_DIR", ""), os.environ.get("DINO_DIR", "")
pytestmark = pytest.mark.skipif(not (DREAMBENCH and DINO), reason="DREAMBENCH_PLUS_DIR and DINO_DIR are not set")

import transformers  # noqa: E402

from benchmarks.paper import metrics  # noqa: E402
from benchmarks.paper.metrics import Drawn  # noqa: E402
from benchmarks.paper.metrics.scorer import Scorer  # noqa: E402
from tests import small_judges  # noqa: E402
from tests.conftest import PHOTOS  # noqa: E402

NAMES = ("clip_i", "clip_t", "dinov1", "dinov2")
# the port's names -> the authors'
RENAMED = {
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "attention.o_proj": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "encoder.layer.": "blocks.",
    "layers.": "blocks.",
    "layernorm.": "norm.",
}


def authors_dino(folder: Path) -> nn.Module:
    """DINO's own model with the weights of the port's folder."""
    own = importlib.import_module("vision_transformer")
    norm = functools.partial(nn.LayerNorm, eps=1e-6)  # as their vit_small
    model = own.VisionTransformer(
        [224], patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, qkv_bias=True, norm_layer=norm
    )
    weights: dict[str, torch.Tensor] = {}
    parts: dict[str, list[torch.Tensor]] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for before, after in RENAMED.items():
            name = name.replace(before, after)
        part = next((part for part in ("query", "key", "value", "q_proj", "k_proj", "v_proj") if part in name), "")
        if part:
            block, kind = name.split(".attention")[0], name.rpartition(".")[2]
            parts.setdefault(f"{block}.attn.qkv.{kind}", [torch.empty(0)] * 3)["qkv".index(part[0])] = tensor
        else:
            weights[name] = tensor
    weights |= {name: torch.cat(three) for name, three in parts.items()}
    model.load_state_dict(weights)
    return model.eval()


@pytest.fixture
def upstream(monkeypatch, tmp_path):
    """Their two modules, with what transformers 5 does otherwise than 4 put back."""
    for module in ("fire", "megfile", "loguru", "pendulum", "torchvision"):
        pytest.importorskip(module)
    monkeypatch.syspath_prepend(DREAMBENCH)
    monkeypatch.syspath_prepend(DINO)
    clip = importlib.import_module("dreambench_plus.metrics.clip_score")
    dino = importlib.import_module("dreambench_plus.metrics.dino_score")

    class OldCLIP(transformers.CLIPModel):  # embeddings by themselves
        def get_image_features(self, *args):
            return super().get_image_features(*args).pooler_output

        def get_text_features(self, *args):
            return super().get_text_features(*args).pooler_output

    class Pillow:  # transformers 4's processors
        @staticmethod
        def from_pretrained(folder, **_):
            images = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
            if not (Path(folder) / "vocab.json").exists():
                return images
            return transformers.CLIPProcessor(images, transformers.CLIPTokenizer.from_pretrained(folder))

    monkeypatch.setattr(clip, "CLIPModel", OldCLIP)
    monkeypatch.setattr(clip, "CLIPProcessor", Pillow)
    monkeypatch.setattr(dino, "BitImageProcessor", Pillow)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield clip, dino
    torch.distributed.destroy_process_group()


def tree(folder: Path) -> list[tuple[Path, Path, str]]:
    """A source picture, a drawn picture and a text for each of several prompts, as they are laid out there."""
    random = np.random.default_rng(0)
    rows = []
    for i, photo in enumerate(sorted(PHOTOS.rglob("*.jpg"))):
        for kind in ("src_image", "tgt_image", "text"):
            (folder / kind / f"subject_{i % 2}").mkdir(parents=True, exist_ok=True)
        source, drawn = (folder / kind / f"subject_{i % 2}" / f"{i}_0.jpg" for kind in ("src_image", "tgt_image"))
        opened = Image.open(photo).convert("RGB")
        opened.resize((200 + 30 * i, 320)).save(source)
        noisy = np.asarray(opened.resize((256, 256)), float) * (0.5 + i / 8) + random.normal(0, 20 * i, (256, 256, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(drawn)
        text = f"a photo of {'red ' * i}dog on the beach {i}"
        (folder / "text" / f"subject_{i % 2}" / f"{i}_0.txt").write_text(text, encoding="utf-8")
        rows.append((source, drawn, text))
    return rows


def test_scores_are_dreambench_plus_own(upstream, tmp_path, monkeypatch):
    clip, dino = upstream
    judges = small_judges.build(tmp_path / "judges")
    monkeypatch.setattr(torch.hub, "load", lambda repository, name: authors_dino(judges["dino_vits8"]))
    rows = tree(tmp_path)
    folders = {kind: str(tmp_path / kind) for kind in ("src_image", "tgt_image", "text")}
    clips = clip.CLIPScore(str(judges["clip"]), device="cpu")
    images = folders["src_image"], folders["tgt_image"]
    theirs = {
        "clip_i": clip.multigpu_eval_clipi_score(*images, clip_score=clips),
        "clip_t": clip.multigpu_eval_clipt_score(folders["text"], folders["tgt_image"], clip_score=clips),
        "dinov1": dino.multigpu_eval_dino_score(*images, dino_score=dino.DinoScore(device="cpu")),
        "dinov2": dino.multigpu_eval_dino_score(
            *images, dino_score=dino.Dinov2Score(str(judges["dinov2"]), device="cpu")
        ),
    }
    judge = Scorer(metrics.choose(NAMES, judges), judges, tmp_path / "cache.sqlite")
    found = judge.scores([Drawn(drawn, (source,), text) for source, drawn, text in rows])
    ours = {name: 100 * float(np.mean([scores[name] for scores in found])) for name in NAMES}
    for name in NAMES:
        print(f"{name}: {theirs[name]:.5f} there, {ours[name]:.5f} here")
    assert ours == pytest.approx(theirs, abs=2e-4)
