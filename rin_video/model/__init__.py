"""The network: tokenizers in, the RIN core, conditioning, tokenizers out."""
