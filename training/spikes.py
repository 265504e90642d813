"""A guard against loss spikes: steps that would harm the weights change nothing."""

import torch

MEMORY = 0.99  # decay of the running means
MAX_LOSS = 20  # times its running mean
MAX_GRAD_NORM = 25  # times its running mean
LEAST_GRAD_NORM = 1.0  # below it a gradient is harmless, however small those before it were


class SpikeGuard:
    """Tells which steps to skip: those without finite numbers, and spikes.

    A spike has a loss of over 20 times, or a gradient norm of over 25 times its running mean, where
    the paper's authors stop and go back to a checkpoint. All numbers stay on the device.
    """

    def __init__(self, device):
        self.means = torch.full((2,), torch.nan, device=device)  # of loss and gradient norm

    def is_bad(self, loss, grad_norm):
        """A boolean tensor: whether to skip this step. loss and grad_norm are scalar tensors."""
        values = torch.stack([loss, grad_norm.to(loss)]).detach()
        finite = values.isfinite().all()
        # Before the first good step the means are NaN, and no comparison with NaN holds.
        is_spike = values[0] > MAX_LOSS * self.means[0]
        is_spike |= (values[1] > MAX_GRAD_NORM * self.means[1]) & (values[1] > LEAST_GRAD_NORM)
        is_bad = ~finite | is_spike
        means = torch.where(self.means.isnan(), values, torch.lerp(values, self.means, MEMORY))
        self.means = torch.where(is_bad, self.means, means)
        return is_bad
