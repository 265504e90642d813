"""What each training stage draws, by which recipe, and which conditions it drops.

A stage only chooses these; train.py's loop and metaquery.py's loss are the same for all.
"""

from data.pictures import black
from data.shapes import CAPTION_KINDS

# What a stage draws of the embedded world, with weights; the last stage goes on with all.
STAGES = {
    "pretrain": CAPTION_KINDS,
    "reconstruct": {"reconstruction": 1},
    "mix": CAPTION_KINDS | {"reconstruction": sum(CAPTION_KINDS.values())},
    "edit": {"edit": 1},
    "instruct": {"reconstruction": 6, "crowded reconstruction": 10, "single object": 6,
                 "colors": 1, "two objects": 2, "counting": 3, "position": 3, "attribution": 3,
                 "dense": 3, "crowded dense": 8, "edit": 12, "crowded edit": 26, "one subject": 11,
                 "two subjects": 11, "three subjects": 1, "association": 3},
}  # fmt: skip
# The recipes at the tiny size and at the paper's (§4, §5.2, §5.3): 25M pictures go eight times
# into 48,828 steps of 4,096, and 2.4M instructions three times into 3,516 of 2,048.
CC12M = {"data": "pixparse/cc12m-wds", "streaming": True, "steps": 48828, "batch_size": 4096,
         "workers": 8}  # fmt: skip
PAPER = {
    "edit": CC12M | {"data": "TIGER-Lab/OmniEdit-Filtered-1.2M", "steps": 1000, "warmup": 100},
    "instruct": CC12M | {"data": "xcpan/MetaQuery_Instruct_2.4M_512res", "steps": 3516,
                         "batch_size": 2048},
}  # fmt: skip
TINY_STEPS = {"edit": 1000, "instruct": 5000}


def recipe(size, stage):
    """The defaults of a stage at a size: what the paper did, or what suits the tiny world."""
    if size == "tiny":
        return {"steps": TINY_STEPS.get(stage, 2400)}
    return {"lr": 1e-4, "warmup": 4000} | PAPER.get(stage, CC12M)


def dropped(stage, prompt, images, u):
    """(prompt, images) with the conditions dropped that a uniform u in [0, 1) says (DESIGN §3).

    So that guidance has something to steer from: a tenth of captions, or of pictures; in
    instruction tuning a tenth of texts alone, of both, and of pictures alone.
    """
    if not images:
        return "" if u < 0.1 else prompt, images
    if stage != "instruct" or not prompt:
        return prompt, black([images])[0] if u < 0.1 else images
    return "" if u < 0.2 else prompt, black([images])[0] if 0.1 <= u < 0.3 else images
