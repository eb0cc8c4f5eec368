"""The training loop and what it needs: optimizer, EMA, checkpoints, metrics, several processes."""
