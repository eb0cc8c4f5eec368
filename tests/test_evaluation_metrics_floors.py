"""The floors of an evaluation: as many frames of each sample as the value has, and frames of whole samples."""

import numpy as np

from rin_video.evaluation import scores
from rin_video.evaluation.extraction import Features


def make_features(generator, num, frames):
    """Return features whose frames are nearly equal within a sample."""
    rows = generator.normal(size=(num, 1, 6)) + 1e-2 * generator.normal(size=(num, frames, 6))
    numbers, labels = np.arange(num), np.full(num, -1)
    return Features({"frame": rows.astype(np.float32)}, None, numbers, labels, "", 0, frozenset(), numbers, [])


def test_floor_of_frames_is_that_of_whole_samples(monkeypatch):
    """The pool has more samples, so fewer of its frames would fit; frames of more samples would lower the floor."""
    monkeypatch.setattr(scores, "MAX_ROWS", 320)
    generator = np.random.default_rng(0)
    samples, real, pool = (make_features(generator, num, 8) for num in (40, 40, 400))
    found = scores.distance_scores(samples, real, pool, lambda text: None)["frame/frechet_distance"]
    assert found.floor_n == 40
    expected = [
        scores.frechet_distance(*(make_features(generator, 40, 8).views["frame"].reshape(320, 6) for _ in range(2)))
        for _ in range(20)
    ]
    values = [estimate.value for estimate in expected]
    assert abs(found.floor - np.mean(values)) < 3 * np.std(values) / 2  # the floor is a mean over 4 divisions
    assert found.floor > 2 * np.mean(values) / 3
