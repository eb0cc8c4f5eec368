"""Data to interface tokens and back."""
