"""How many training steps stage 2 takes before and under the reward: time given up in the one is spent in the other."""

from alignflow_core.config import Align

REWARD_COST = 5  # steps of the denoising loss alone that one with the reward takes the time of (64 px; twice as many at 48)


def rewardless_steps(settings: Align) -> int:
    """Steps before the reward takes part: none where no pairs are recoloured."""
    return settings.recolour_steps if settings.recolour and settings.denoise == "source" else 0


def rewarded_steps(settings: Align) -> int:
    """The steps after those: where no pairs are recoloured as many more as cost the same time, all of them if there is no reward either."""
    instead = settings.recolour_steps - rewardless_steps(settings)
    return settings.training.steps + (instead if settings.rho == 0 else instead // REWARD_COST)
