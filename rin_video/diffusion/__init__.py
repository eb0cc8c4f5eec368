"""Gaussian diffusion for tensors of any shape: schedules, losses and samplers, combined in `GaussianDiffusion`."""

from rin_video.diffusion.process import GaussianDiffusion, LossTerms

__all__ = ["GaussianDiffusion", "LossTerms"]
