"""What each training stage draws, and by which recipe.

A stage only chooses these; train.py's loop and metaquery.py's loss are the same for all.
"""

from toy.tasks import CAPTION_KINDS

# What a stage draws of the toy world, with weights. The last stage repeats all that came before it,
# so that nothing is forgotten.
STAGES = {
    "pretrain": CAPTION_KINDS,
    "reconstruct": {"reconstruction": 1},
    "mix": CAPTION_KINDS | {"reconstruction": sum(CAPTION_KINDS.values())},
    "edit": {"edit": 1},
    "instruct": {"reconstruction": 6, "crowded reconstruction": 10, "single object": 6,
                 "colors": 1, "two objects": 2, "counting": 3, "position": 3, "attribution": 3,
                 "dense": 3, "crowded dense": 8, "edit": 12, "crowded edit": 26, "one subject": 14,
                 "two subjects": 16, "three subjects": 1, "association": 6,
                 "free wordings": 40, "two colours": 8, "free edit": 16, "free dense": 10},
}  # fmt: skip
NEEDS_CHECKPOINT = ("edit", "instruct")  # stages that fine-tune an existing model
# The toy world's recipes, where they differ from TrainConfig's defaults. What is drawn and where is
# decided at high noise levels: pretraining has more of them.
TINY_RECIPES = {
    "pretrain": {"steps": 900, "lr": 3e-4, "sigma_shift": 3.0},
    "edit": {"steps": 1000},
    "instruct": {
        "steps": 8000,
        "batch_size": 64,
        "micro_batch_size": 16,
        "lr": 5e-4,
        "warmup": 100,
    },
}


def recipe(size, stage):
    """Defaults of TrainConfig's fields for a stage at a size: the paper's, or the toy world's."""
    if size == "tiny":
        return TINY_RECIPES.get(stage, {})
    # §4: 25M pictures eight times are 48,828 steps of 4,096. The paper does not name all of its
    # pictures; cc12m alone has 11M, of which this is 18 passes. Weight decay and the gradient's
    # norm, on which the paper is silent, are those of its authors' code.
    paper = {
        "data": "pixparse/cc12m-wds",
        "streaming": True,
        "steps": 48828,
        "batch_size": 4096,
        "micro_batch_size": 16,  # ours: what fits 80 GB at base, see training.sizes
        "workers": 8,
        "lr": 1e-4,
        "warmup": 4000,
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
    }
    if stage == "edit":  # §5.3; the warm-up and the batch size are ours
        paper |= {"data": "TIGER-Lab/OmniEdit-Filtered-1.2M", "steps": 1000, "warmup": 100}
    if stage == "instruct":  # §4: 2.4M instructions three times are 3,516 steps of 2,048
        # The paper's 4,000 steps of warm-up would outlast the run: its authors ran 2,000.
        paper |= {"data": "xcpan/MetaQuery_Instruct_2.4M_512res", "steps": 3516}
        paper |= {"batch_size": 2048, "warmup": 2000}
    return paper
