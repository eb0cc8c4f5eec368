"""Errors of predicted frames: squared error, PSNR and SSIM."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from rin_video.evaluation.intervals import Array

WINDOW, SIGMA = 11, 1.5  # of the Gaussian window of SSIM, pixels
C1, C2 = 0.01**2, 0.03**2  # for values in [0, 1]
MAX_PSNR = 100.0  # dB, of equal frames; the mean over frames would be infinite


def squared_errors(predicted: Array, truth: Array) -> Array:
    """Return the mean squared error (..., F) of frames (..., C, F, H, W)."""
    return ((predicted - truth) ** 2).mean((-4, -2, -1))


def psnr(squared: Array) -> Array:
    """Return the peak signal-to-noise ratio in dB for mean squared errors of values in [0, 1], 100 at most."""
    return -10 * np.log10(np.maximum(squared, 10 ** (-MAX_PSNR / 10)))


def ssim(predicted: Array, truth: Array) -> Array:
    """Return the structural similarity (..., F) of frames (..., C, F, H, W) in [0, 1] (Wang et al. 2004).

    The window is a Gaussian of 11 x 11 pixels and deviation 1.5, the constants are K1 = 0.01 and K2 = 0.03, variances
    are those of the window without correction. Windows that cross the border are left out, as in the paper: nothing is
    padded. The result is the mean over windows and channels. `truth` may lack the leading dimensions.
    """
    mu_x, mu_y = window_means(predicted), window_means(truth)
    var_x, var_y = window_means(predicted**2) - mu_x**2, window_means(truth**2) - mu_y**2
    covariance = window_means(predicted * truth) - mu_x * mu_y
    found = (2 * mu_x * mu_y + C1) * (2 * covariance + C2) / ((mu_x**2 + mu_y**2 + C1) * (var_x + var_y + C2))
    return np.asarray(found.mean((-4, -2, -1)), np.float64)


def window_means(frames: Array) -> Array:
    """Return the Gaussian-weighted means (..., H - 10, W - 10) of all windows inside frames (..., H, W)."""
    down, across = (window_weights(size) for size in frames.shape[-2:])
    return np.asarray(down @ frames @ across.T, np.float64)


@lru_cache
def window_weights(size: int) -> Array:
    """Return (size - 10, size): row i has the Gaussian weights of the window that begins at pixel i."""
    line = np.exp(-((np.arange(WINDOW) - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    rows = np.zeros((size - WINDOW + 1, size))
    for i, row in enumerate(rows):
        row[i : i + WINDOW] = line / line.sum()
    return rows
