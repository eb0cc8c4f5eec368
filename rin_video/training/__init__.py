"""The training loop and its parts: optimizer, EMA, checkpoints, metrics and distributed training."""
