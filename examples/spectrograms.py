"""Train on your own tensors; in this example, spectrograms of chirps (1, 32 frequencies, 32 times).

python examples/spectrograms.py runs/chirps
"""

import sys

import torch
from torch.utils.data import Dataset

from rin_video import RIN, Callback, GaussianDiffusion, Trainer


class Chirps(Dataset):
    """Spectrograms in [0, 1] of tones that rise (label 1) or fall (label 0)."""

    def __len__(self):
        return 512

    def __getitem__(self, index):
        low, high = 0.02 + 0.4 * torch.rand(2, generator=torch.Generator().manual_seed(index))
        wave = torch.sin(2 * torch.pi * torch.linspace(low, high, 1024).cumsum(0))
        power = torch.stft(wave, 64, 32, window=torch.hann_window(64), return_complex=True).abs()[:32, :32]
        return {"x": (power / 32).clamp(0, 1)[None], "label": int(high > low)}


class Loudness(Callback):
    """Logs the mean value of samples of rising tones as the metric "loudness"."""

    def evaluate(self, trainer, diffusion):
        return {"loudness": diffusion.sample(batch_size=8, steps=10, label=1, seed=0).mean().item()}


if __name__ == "__main__":  # required, because the data loader's processes may import this file
    out, steps = sys.argv[1], int((sys.argv[2:] or ["2000"])[0])
    model = RIN(dim=64, channels=1, image_size=32, patch_size=4, depth=2, num_latents=32, num_classes=2, num_heads=4)
    diffusion = GaussianDiffusion(model, objective="x0", train_prob_self_cond=0)
    options = {"results_folder": out, "train_num_steps": steps, "train_lr": 1e-3, "save_and_sample_every": 500}
    Trainer(diffusion, Chirps(), callbacks=[Loudness()], **options).train()
