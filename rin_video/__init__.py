"""Train and sample Recurrent Interface Networks on images and video."""
