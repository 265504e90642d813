"""What each stage draws of the toy world."""

import pytest
import torch

from data.batches import ToyTasks, to_pixels
from data.stages import STAGES


@pytest.mark.parametrize("stage", STAGES)
def test_stages_yield_their_kinds(stage):
    """Different counts of pictures in one batch; the same index is the same sample."""
    data = ToyTasks(STAGES[stage], 0)
    rows = [data[i] for i in range(64)]
    prompts, images = [row.prompt for row in rows], [row.images for row in rows]
    targets = to_pixels([row.target for row in rows], 64)
    assert targets.shape == (64, 3, 64, 64) and targets.min() >= -1 and targets.max() <= 1
    counts = {len(row) for row in images}
    expected = {"pretrain": {0}, "mix": {0, 1}, "instruct": {0, 1, 2}}.get(stage, {1})
    assert expected <= counts <= expected | ({3} if stage == "instruct" else set())
    assert torch.equal(to_pixels([data[5].target], 64)[0], targets[5])
    assert data[5].prompt == prompts[5]
    if stage in ("reconstruct", "mix"):
        assert all(not prompt for prompt, row in zip(prompts, images, strict=True) if row)
