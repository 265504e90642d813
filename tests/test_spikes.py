"""The guard against loss spikes: off where it never fires."""

import torch

from training.spikes import SpikeGuard


def judged(losses, norms):
    guard = SpikeGuard("cpu")
    pairs = zip(losses, norms, strict=True)
    return [bool(guard.is_bad(torch.tensor(x), torch.tensor(n))) for x, n in pairs], guard


def test_only_spikes_and_what_is_not_finite_are_bad():
    nan, inf = float("nan"), float("inf")
    losses = [1.0, 0.9, 21.0, nan, 0.8, 0.8, 0.8]
    norms = [2.0, 2.0, 2.0, 2.0, inf, 60.0, 2.0]
    assert judged(losses, norms)[0] == [False, False, True, True, True, True, False]


def test_a_small_gradient_is_no_spike():
    assert judged([1.0] * 3, [1e-3, 0.9, 1.1])[0] == [False, False, True]


def test_what_is_skipped_does_not_move_the_means():
    _, guard = judged([1.0, 100.0, 2.0], [1.0, 1.0, 1.0])
    assert torch.allclose(guard.means, torch.tensor([0.99 * 1.0 + 0.01 * 2.0, 1.0]))
