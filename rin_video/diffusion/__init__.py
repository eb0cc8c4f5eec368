"""Gaussian diffusion for tensors of any shape: schedules, losses, samplers, and `GaussianDiffusion` over them."""

from rin_video.diffusion.process import GaussianDiffusion, LossTerms

__all__ = ["GaussianDiffusion", "LossTerms"]
