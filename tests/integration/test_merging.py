"""sd-scripts' own merging beside ours: the rules that tests/test_merge.py says it has, and its names of blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from networks import deft_blocks
from tests.conftest import relative_error
from tests.integration.conftest import SD_SCRIPTS, needs_sd_scripts, run_script
from tests.test_merge import SHAPES, adapter, added_by_sd_scripts, clamped, deltas, sum_of

pytestmark = needs_sd_scripts

NAMES = """
import json, sys
sys.path.insert(0, sys.argv[1] + "/networks")
from svd_merge_lora import LAYER26, get_lbw_block_index
names = json.loads(sys.argv[2])
print("BLOCKS", json.dumps({name: list(LAYER26)[get_lbw_block_index(name, "_blocks_" in name and "put_" in name
    or "middle" in name or "label" in name)] for name in names}))
"""


@pytest.mark.parametrize("options", [[], ["--concat"]], ids=["added", "concatenated"])
def test_its_sum_is_what_its_rule_makes(tmp_path, options):
    files = [adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors")]
    output, ratios = tmp_path / "theirs.safetensors", [0.8, -0.5]
    given = ["--models", *files, "--ratios", *ratios, "--save_to", output]
    run_script(Path(SD_SCRIPTS or "") / "networks" / "sdxl_merge_lora.py", *given, *options, with_deft=False)
    theirs, rule = deltas(output), added_by_sd_scripts(files, ratios, bool(options))
    ours, parts = deltas(sum_of(tmp_path, "--models", *files, "--ratios", *ratios)), [deltas(file) for file in files]
    for name in SHAPES:
        exact = ratios[0] * parts[0][name] + ratios[1] * parts[1][name]
        assert relative_error(theirs[name], rule[name]) < 1e-5
        assert relative_error(ours[name], exact) < 1e-6
        assert relative_error(theirs[name], exact) > 0.4


def test_its_truncation_is_clamped(tmp_path):
    files = [adapter(tmp_path / "a.safetensors"), adapter(tmp_path / "b.safetensors")]
    output = tmp_path / "theirs.safetensors"
    script = Path(SD_SCRIPTS or "") / "networks" / "svd_merge_lora.py"
    run_script(script, "--models", *files, "--ratios", 1, 1, "--new_rank", 4, "--save_to", output, with_deft=False)
    parts, theirs = [deltas(file) for file in files], deltas(output)
    ours = deltas(sum_of(tmp_path, "--models", *files, "--new_rank", 4))
    for name in SHAPES:
        exact = parts[0][name] + parts[1][name]
        assert relative_error(theirs[name], clamped(exact, 4)) < 1e-3
        assert relative_error(ours[name], exact) < relative_error(theirs[name], exact)


def test_its_blocks_are_ours(tmp_path):
    places = [f"down_blocks_{i}_attentions_{j}" for i in range(3) for j in range(2)]
    places += [f"up_blocks_{i}_{kind}_{j}" for i in range(4) for kind in ("resnets", "upsamplers") for j in range(3)]
    places += [f"down_blocks_{i}_downsamplers_0" for i in range(3)] + ["mid_block_attentions_0"]
    places += [f"{way}_blocks_{i}_1" for way in ("input", "output") for i in range(9)] + [
        "middle_block_1",
        "label_emb_0",
    ]
    names = [
        f"lora_unet_{place}_proj" for place in places if "upsamplers_1" not in place and "upsamplers_2" not in place
    ]
    names.append("lora_te1_text_model_encoder_layers_0_mlp_fc1")
    script = tmp_path / "names.py"
    script.write_text(NAMES)
    printed = run_script(script, SD_SCRIPTS or "", json.dumps(names), with_deft=False)
    theirs = json.loads(printed.split("BLOCKS ")[1].splitlines()[0])
    assert {name: deft_blocks.block_of(name) for name in names} == theirs
