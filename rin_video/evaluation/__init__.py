"""Metrics of generated images and clips, with intervals and the floor of real against real data."""
