"""Runs what DreamBench++ has itself, in a checkout of yuangpeng/dreambench_plus, and prints it as JSON.

    PYTHONPATH=CHECKOUT python tests/dreambench_plus_side.py DATA TREE ANSWERS OUT

Its data set reads DATA; its pairing of pictures and its two raters go over TREE, where the model is replaced by
ANSWERS (kind/collection/prompt/run -> content); its table is of what the raters wrote to OUT.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import sys
import time
from pathlib import Path

import torch

DATA, TREE, ANSWERS, OUT = (Path(argument).resolve() for argument in sys.argv[1:])
METHOD, NAME = "Made LoRA", "made_lora"
FILTERS = (None, "animal", "human", "object", "style", "photorealistic", "style_transfer", "imaginative")

os.chdir(OUT)
from dreambench_plus import constants  # noqa: E402

constants.METHODS.clear()
constants.METHODS[METHOD] = str(TREE)
constants.DREAMBENCH_PLUS_DIR = str(DATA)

from accelerate import PartialState  # noqa: E402
from dreambench_plus import benchmarking, eval_concept_preservation, eval_prompt_following  # noqa: E402
from dreambench_plus.dreambench_plus_dataset import DreamBenchPlus  # noqa: E402
from dreambench_plus.metrics import clip_score  # noqa: E402

time.sleep = lambda seconds: None
answers = json.loads(ANSWERS.read_text())
dataset = DreamBenchPlus(str(DATA))
sent = {}


def rate(module, kind: str, folder: str, run: str, **options) -> None:
    """One rater over all items of one run."""
    out = OUT / "data_gpt_rating" / f"{folder}_{run}" / NAME
    out.mkdir(parents=True, exist_ok=True)
    for collection in dataset:
        for index in range(len(collection.captions)):
            key = f"{kind}/{collection.collection_id}/{index}/{run}"

            def answer(messages, key=key, **how):
                sent[key] = {"messages": messages, "temperature": how["temperature"], "model": how["model"]}
                return answers[key]

            module.call_gpt = answer
            if kind == "cp":
                options["category"] = "style" if collection.category == "style" else "subject"
                options["few_shot"] = 0
            module.execute_gpt_task(
                method=METHOD, method_dir=constants.METHODS[METHOD], collection_id=collection.collection_id,
                prompt_index=index, ablation_settings="full", out_dir=str(out), model_name="rater", max_retry=3,
                **options,
            )  # fmt: skip


class Counts:
    """In CLIP's place: what is compared with what."""

    pairs = 0

    def clipi_score(self, one, other):
        """Of a pair."""
        self.pairs += 1
        return torch.tensor(100.0), 1

    clipt_score = clipi_score


def paired() -> list[int]:
    """How many pairs upstream's metrics find; they refuse a tree whose files do not fit each other."""
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    found = []
    for function, other in ((clip_score.multigpu_eval_clipi_score, "src_image"),
                            (clip_score.multigpu_eval_clipt_score, "text")):  # fmt: skip
        counts = Counts()
        function(f"{TREE}/{other}", f"{TREE}/tgt_image", distributed_state=PartialState(cpu=True), clip_score=counts)
        found.append(counts.pairs)
    return found


with contextlib.redirect_stdout(sys.stderr):
    pairs = paired()
    for run in ("full", "full2", "full3"):
        rate(eval_concept_preservation, "cp", "concept_preservation", run)
        rate(eval_prompt_following, "pf", "prompt_following", run)
    for group in ("group1", "group2"):
        raw = OUT / "data_human_rating" / "raw_data" / group
        raw.mkdir(parents=True)
        (raw / f"one-{NAME}.json").write_text(json.dumps({f"{dataset[0].collection_id}-0": [4, 4]}))
printed = io.StringIO()
with contextlib.redirect_stdout(printed):
    runpy.run_module("dreambench_plus.benchmarking", run_name="__main__")
means = {
    folder: {
        str(of): [benchmarking.cal_score(OUT / "data_gpt_rating" / f"{folder}_{run}" / f"{NAME}.json", of)
                  for run in ("full", "full2", "full3")]
        for of in FILTERS
    }
    for folder in ("concept_preservation", "prompt_following")
}  # fmt: skip
collections = {c.collection_id: [c.category, c.subject, c.captions] for c in dataset}
print(json.dumps({"collections": collections, "sent": sent, "means": means, "printed": printed.getvalue(),
                  "pairs": pairs}))  # fmt: skip
