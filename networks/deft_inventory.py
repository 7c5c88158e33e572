"""The layers of the models that adapters are mostly made for, by every name that programs have for them.

Known without a model: each U-Net, transformer and text encoder is a few numbers (widths, depths) and a rule. The tests
hold them against the real classes, made on the meta device from the published configurations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Layer:
    """A layer with a weight that an adapter can change.

    :param part: "unet" (transformers too), "te1", "te2" or "te3"
    :param path: in the model's original code, dots in it; what sd-scripts calls it in SDXL and FLUX.1
    :param diffusers: its paths in Diffusers, more than one where the original has them in one weight
    :param shape: (m, in[, kh, kw]); (m,) of a norm
    :param rows: outputs of each of `diffusers`
    :param inside: within the blocks whose layers sd-scripts' LoRA adapts
    """

    part: str
    path: str
    diffusers: tuple[str, ...]
    shape: tuple[int, ...]
    rows: tuple[int, ...] = ()
    inside: bool = True

    @property
    def is_norm(self) -> bool:
        """LyCORIS alone adapts these."""
        return len(self.shape) == 1


@dataclass(frozen=True)
class Inventory:
    """All layers of a model.

    :param name: short
    :param title: for people
    :param architecture: the row of `deft_architectures.ARCHITECTURES`
    :param prefixes: part -> prefix of sd-scripts' key names
    :param original: sd-scripts' names come from the original's paths, not from Diffusers'
    """

    name: str
    title: str
    architecture: str
    prefixes: Mapping[str, str]
    original: bool
    layers: tuple[Layer, ...] = field(repr=False)

    def key(self, layer: Layer) -> str:
        """sd-scripts' key name of a layer."""
        path = layer.path if self.original else layer.diffusers[0]
        return f"{self.prefixes[layer.part]}_{flat(path)}"


def flat(path: str) -> str:
    """A path as it stands in kohya's key names."""
    return path.replace(".", "_")


@dataclass(frozen=True)
class _UNet:
    """widths by level; depths: transformer blocks in each attention of a level; wide: width of the texts."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    wide: int
    linear: bool
    added: int = 0

    def layers(self) -> Iterator[Layer]:
        first, time, levels = self.widths[0], 4 * self.widths[0], len(self.widths)
        yield _outside("input_blocks.0.0", "conv_in", (first, 4, 3, 3))
        yield _outside("time_embed.0", "time_embedding.linear_1", (time, first))
        yield _outside("time_embed.2", "time_embedding.linear_2", (time, time))
        if self.added:
            yield _outside("label_emb.0.0", "add_embedding.linear_1", (time, self.added))
            yield _outside("label_emb.0.2", "add_embedding.linear_2", (time, time))
        width, skips = first, [first]
        for i, out in enumerate(self.widths):
            for j in range(2):
                yield from self._resnet(f"input_blocks.{3 * i + j + 1}.0", f"down_blocks.{i}.resnets.{j}", width, out)
                pair = (f"input_blocks.{3 * i + j + 1}.1", f"down_blocks.{i}.attentions.{j}")
                yield from self._attention(*pair, out, self.depths[i])
                width = out
                skips.append(out)
            if i < levels - 1:
                down = (f"input_blocks.{3 * i + 3}.0.op", f"down_blocks.{i}.downsamplers.0.conv")
                yield _layer(*down, (out, out, 3, 3))
                skips.append(out)
        yield from self._resnet("middle_block.0", "mid_block.resnets.0", width, width)
        yield from self._attention("middle_block.1", "mid_block.attentions.0", width, self.depths[-1] or 1)
        yield from self._resnet("middle_block.2", "mid_block.resnets.1", width, width)
        for i, out in enumerate(reversed(self.widths)):
            depth = self.depths[levels - 1 - i]
            for j in range(3):
                place, level = f"output_blocks.{3 * i + j}", f"up_blocks.{i}"
                yield from self._resnet(f"{place}.0", f"{level}.resnets.{j}", width + skips.pop(), out)
                yield from self._attention(f"{place}.1", f"{level}.attentions.{j}", out, depth)
                width = out
            if i < levels - 1:
                up = (f"output_blocks.{3 * i + 2}.{2 if depth else 1}.conv", f"up_blocks.{i}.upsamplers.0.conv")
                yield _layer(*up, (out, out, 3, 3))
        yield _outside("out.0", "conv_norm_out", (first,))
        yield _outside("out.2", "conv_out", (4, first, 3, 3))

    def _resnet(self, path: str, other: str, before: int, out: int) -> Iterator[Layer]:
        yield _layer(f"{path}.in_layers.0", f"{other}.norm1", (before,))
        yield _layer(f"{path}.in_layers.2", f"{other}.conv1", (out, before, 3, 3))
        yield _layer(f"{path}.emb_layers.1", f"{other}.time_emb_proj", (out, 4 * self.widths[0]))
        yield _layer(f"{path}.out_layers.0", f"{other}.norm2", (out,))
        yield _layer(f"{path}.out_layers.3", f"{other}.conv2", (out, out, 3, 3))
        if before != out:
            yield _layer(f"{path}.skip_connection", f"{other}.conv_shortcut", (out, before, 1, 1))

    def _attention(self, path: str, other: str, width: int, depth: int) -> Iterator[Layer]:
        if not depth:
            return
        ones = () if self.linear else (1, 1)
        inner: list[tuple[str, tuple[int, ...]]] = [("norm", (width,)), ("proj_in", (width, width, *ones))]
        for k in range(depth):
            for attention, wide in (("attn1", width), ("attn2", self.wide)):
                sizes = {"to_q": width, "to_k": wide, "to_v": wide, "to_out.0": width}
                inner += [(f"transformer_blocks.{k}.{attention}.{n}", (width, size)) for n, size in sizes.items()]
            inner += [(f"transformer_blocks.{k}.ff.net.0.proj", (8 * width, width)),
                      (f"transformer_blocks.{k}.ff.net.2", (width, 4 * width))]  # fmt: skip
            inner += [(f"transformer_blocks.{k}.norm{n}", (width,)) for n in (1, 2, 3)]
        inner += [("proj_out", (width, width, *ones))]
        yield from (_layer(f"{path}.{name}", f"{other}.{name}", shape) for name, shape in inner)


def _layer(path: str, other: str, shape: tuple[int, ...]) -> Layer:
    return Layer("unet", path, (other,), shape)


def _outside(path: str, other: str, shape: tuple[int, ...]) -> Layer:
    return Layer("unet", path, (other,), shape, inside=False)


def _clip(part: str, blocks: int, width: int, projection: bool = False) -> Iterator[Layer]:
    sizes = {f"self_attn.{n}_proj": (width, width) for n in ("q", "k", "v", "out")}
    sizes |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(blocks):
        for name, shape in sizes.items():
            path = f"text_model.encoder.layers.{i}.{name}"
            yield Layer(part, path, (path,), shape)
    if projection:
        yield Layer(part, "text_projection", ("text_projection",), (width, width), inside=False)


def _t5(part: str, blocks: int, width: int, inner: int) -> Iterator[Layer]:
    sizes = {f"layer.0.SelfAttention.{n}": (width, width) for n in "qkvo"}
    sizes |= {f"layer.1.DenseReluDense.{n}": (inner, width) for n in ("wi_0", "wi_1")}
    sizes |= {"layer.1.DenseReluDense.wo": (width, inner)}
    for i in range(blocks):
        for name, shape in sizes.items():
            path = f"encoder.block.{i}.{name}"
            yield Layer(part, path, (path,), shape)


def _flux(double: int, single: int, d: int) -> Iterator[Layer]:
    streams = {"img": ("attn.to_{}", "attn.to_out.0", "ff", "norm1"),
               "txt": ("attn.add_{}_proj", "attn.to_add_out", "ff_context", "norm1_context")}  # fmt: skip
    for i in range(double):
        for stream, (qkv, out, ff, norm) in streams.items():
            path, other = f"double_blocks.{i}.{stream}", f"transformer_blocks.{i}"
            yield _layer(f"{path}_mod.lin", f"{other}.{norm}.linear", (6 * d, d))
            parts = tuple(f"{other}.{qkv.format(n)}" for n in "qkv")
            yield Layer("unet", f"{path}_attn.qkv", parts, (3 * d, d), (d, d, d))
            yield _layer(f"{path}_attn.proj", f"{other}.{out}", (d, d))
            yield _layer(f"{path}_mlp.0", f"{other}.{ff}.net.0.proj", (4 * d, d))
            yield _layer(f"{path}_mlp.2", f"{other}.{ff}.net.2", (d, 4 * d))
    for i in range(single):
        path, other = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        parts = (*(f"{other}.attn.to_{n}" for n in "qkv"), f"{other}.proj_mlp")
        yield Layer("unet", f"{path}.linear1", parts, (7 * d, d), (d, d, d, 4 * d))
        yield _layer(f"{path}.linear2", f"{other}.proj_out", (d, 5 * d))
        yield _layer(f"{path}.modulation.lin", f"{other}.norm.linear", (3 * d, d))
    embedders = {"time_in": ("timestep_embedder", 256), "vector_in": ("text_embedder", 768),
                 "guidance_in": ("guidance_embedder", 256)}  # fmt: skip
    for path, (other, size) in embedders.items():
        for n, (end, inputs) in enumerate((("in_layer", size), ("out_layer", d)), 1):
            yield _outside(f"{path}.{end}", f"time_text_embed.{other}.linear_{n}", (d, inputs))
    yield _outside("img_in", "x_embedder", (d, 64))
    yield _outside("txt_in", "context_embedder", (d, 4096))
    yield _outside("final_layer.linear", "proj_out", (64, d))
    yield _outside("final_layer.adaLN_modulation.1", "norm_out.linear", (2 * d, d))


_SD = "Stable Diffusion 1.x or 2.x"
NAMES = ("sd1", "sd2", "sdxl", "flux")


@functools.cache
def inventory(name: str) -> Inventory:
    """Every layer of one of `NAMES`."""
    if name == "sd1":
        unet = _UNet((320, 640, 1280, 1280), (1, 1, 1, 0), 768, linear=False)
        layers = (*unet.layers(), *_clip("te1", 12, 768))
        return Inventory(name, "Stable Diffusion 1.x", _SD, {"unet": "lora_unet", "te1": "lora_te"}, False, layers)
    if name == "sd2":
        unet = _UNet((320, 640, 1280, 1280), (1, 1, 1, 0), 1024, linear=True)
        layers = (*unet.layers(), *_clip("te1", 23, 1024))
        return Inventory(name, "Stable Diffusion 2.x", _SD, {"unet": "lora_unet", "te1": "lora_te"}, False, layers)
    prefixes = {"unet": "lora_unet", "te1": "lora_te1", "te2": "lora_te2", "te3": "lora_te3"}
    if name == "sdxl":
        unet = _UNet((320, 640, 1280), (0, 2, 10), 2048, linear=True, added=2816)
        layers = (*unet.layers(), *_clip("te1", 12, 768), *_clip("te2", 32, 1280, projection=True))
        return Inventory(name, "SDXL", "SDXL", prefixes, True, layers)
    layers = (*_flux(19, 38, 3072), *_clip("te1", 12, 768), *_t5("te3", 24, 4096, 10240))
    return Inventory(name, "FLUX.1", "FLUX.1 or Chroma", prefixes, True, layers)
