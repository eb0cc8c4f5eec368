"""The network: a tokenizer, the conditioning, and the core of latents and blocks."""
