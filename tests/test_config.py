"""Configs: precedence, presets, the round trip through YAML, and the errors for wrong keys and values."""

import dataclasses
import subprocess
import sys
from importlib import resources

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rin_video import UsageError
from rin_video.config import (
    Config,
    DataConfig,
    DiffusionConfig,
    ModelConfig,
    SampleConfig,
    TrainConfig,
    model_config,
    train_config,
)
from rin_video.config_files import load_config, presets, to_yaml

SECTIONS = {
    "model": ModelConfig,
    "diffusion": DiffusionConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "sample": SampleConfig,
}


def preset_text(name):
    return (resources.files("rin_video.configs") / f"{name}.yaml").read_text(encoding="utf-8")


def plain(value, path="config"):
    """Fail if a value is neither a builtin type nor one of our dataclasses."""
    if type(value) in (Config, *SECTIONS.values()):
        for field in dataclasses.fields(value):
            plain(getattr(value, field.name), f"{path}.{field.name}")
    elif type(value) is dict:
        for key, item in value.items():
            assert type(key) is str, path
            plain(item, f"{path}.{key}")
    elif type(value) in (list, tuple):
        for i, item in enumerate(value):
            plain(item, f"{path}[{i}]")
    else:
        assert value is None or type(value) in (str, int, float, bool), f"{path} is a {type(value)}"


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message, message
    return message


# ---- presets


def test_there_are_presets():
    assert {"cifar10", "demo", "image64", "imagenet64", "video64"} <= set(presets())


@pytest.mark.parametrize("name", presets())
def test_a_preset_loads_as_plain_objects_and_begins_with_its_story(name):
    config = load_config(name)
    assert type(config) is Config
    plain(config)
    assert config != Config()
    assert preset_text(name).startswith("#")


@pytest.mark.parametrize("name", [None, *presets()])
def test_yaml_round_trip(name, tmp_path):
    config = load_config(name)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config
    assert load_config(str(file)) == config


WORDS = [
    "a b", "true", "no", "1", "007", "1e3", "1_0", ".5", "0x1f", "1:30", "2026-11-26", "a: b", "#x", "- x", "~",
    "ünïcödé/片", "null", "", "???", "${x}", "${oc.env:HOME}", "$", "'", '"', "''", "C:\\clips", " x", "x ", "\t",
    "a\nb",
    "a\r\n", "😀", "é", "\x00", "\x85", "\u2028", "\ufeffx", "\udcff", "---", "...", "%x", "@x", "`",
    "!!python/object:x",
    "&anchor", "*alias", "<<", "=", "{a}", "[a]", "a, b", "|", ">", "x" * 300,
]  # fmt: skip


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-12, 1e12), st.sampled_from(WORDS) | st.text(st.characters()))
def test_numbers_and_text_survive_the_round_trip(tmp_path_factory, number, word):
    config = Config()
    config.train.train_lr = number
    config.diffusion.noise_schedule = {"name": "cosine", "tau": number}
    config.model.latent_self_attn_depth = [1, 2]
    config.data.path, config.data.classes, config.sample.label = word, [word, "x", word], word
    file = tmp_path_factory.getbasetemp() / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(file) == config


@pytest.mark.parametrize("word", WORDS)
def test_text_of_any_kind_survives_the_round_trip(word, tmp_path):
    config = Config()
    config.data.path, config.data.classes, config.sample.label = word, [word, "x", word], word
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config
    if word not in ("", "null", "~", "''"):
        assert load_config(None, [f"data.path={word}"]).data.path == word


# ---- precedence


def test_nothing_given_is_the_dataclasses():
    assert load_config() == Config()


def test_dataclass_then_preset_then_overrides(tmp_path):
    assert TrainConfig().optimizer == "adamw"
    assert TrainConfig().gradient_accumulate_every == 1
    cifar = load_config("cifar10")
    assert (cifar.train.optimizer, cifar.train.train_lr, cifar.train.gradient_accumulate_every) == ("lamb", 3e-3, 1)
    config = load_config("cifar10", ["train.train_lr=3e-4", "model.patch_size=[4,4]", "data.path=a/b", "data.fps=12"])
    assert (config.train.optimizer, config.train.train_lr, config.train.warmup_steps) == ("lamb", 3e-4, 10_000)
    assert (config.model.patch_size, config.data.path, config.data.fps) == ([4, 4], "a/b", 12.0)
    plain(config)

    file = tmp_path / "mine.yaml"
    file.write_text("train: {train_lr: 1}\ndiffusion:\n  noise_schedule: {name: cosine, tau: 0.5}\n")
    config = load_config(file, ["train.train_lr=2", "train.train_lr=5", "diffusion.noise_schedule.end=2"])
    assert config.train.train_lr == 5.0
    assert config.diffusion.noise_schedule == {"name": "cosine", "tau": 0.5, "end": 2}
    assert config.model == ModelConfig()
    plain(config)


@pytest.mark.parametrize(
    ("overrides", "loss_weight"),
    [
        ([], {"name": "power", "power": 0.7}),
        (["loss_weight=none"], "none"),
        (["loss_weight=power"], "power"),  # a name alone uses its default parameters
        (["loss_weight={}"], "power"),
        (["loss_weight={name: min_snr, gamma: 3}"], {"name": "min_snr", "gamma": 3}),
        (["loss_weight=min_snr", "loss_weight.gamma=3"], {"name": "min_snr", "gamma": 3}),
        (["loss_weight.gamma=3", "loss_weight=min_snr"], {"name": "min_snr", "gamma": 3}),  # in any order
        (["loss_weight.limit=5"], {"name": "power", "power": 0.7, "limit": 5}),
    ],
)
@pytest.mark.parametrize("form", ["loss_weight: {name: power, power: 0.7}",
                                  "loss_weight: power, loss_weight_kwargs: {power: 0.7}"])  # fmt: skip
def test_a_name_and_its_parameters(tmp_path, form, overrides, loss_weight):
    """Both the current form and that of an earlier version work."""
    file = tmp_path / "mine.yaml"
    file.write_text(f"diffusion: {{{form}}}\n")
    assert load_config(file, [f"diffusion.{one}" for one in overrides]).diffusion.loss_weight == loss_weight


def test_defaults_are_not_shared_between_configurations():
    one, other = load_config(), load_config()
    one.train.betas.append(3)
    one.diffusion.known["first"] = 3
    assert other == Config() == load_config()


@pytest.mark.parametrize("text", ["model.frames=null", "model.frames=none"])
def test_none_can_be_asked_for(text):
    if text.endswith("null"):
        assert load_config("video64", [text]).model.frames is None
    else:
        with pytest.raises(UsageError, match=r"model.frames=none"):
            load_config("video64", [text])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data.path=null", None),
        ("data.path=~", None),
        ("data.path=", None),
        ("data.path='null'", "null"),
        ('data.path="a\\tb"', "a\tb"),
        ("data.path=1e3", "1e3"),
        ("data.path=007", "007"),
        ("data.path=a: b", "a: b"),
        ("data.path= x", " x"),
        ("data.path='x", "'x"),
        ("data.path=${oc.env:HOME}", "${oc.env:HOME}"),
        ("data.classes=[007, 1e3, no, 'null', '${x}']", ["007", "1e3", "no", "null", "${x}"]),
        ("sample.label=007", "007"),
        ("sample.label='7'", "7"),
        ("sample.label=7", 7),
        ("sample.spacing=null", None),
        ("train.mixed_precision=no", "no"),
        ("train.train_lr=1e-2", 0.01),
        ("train.train_lr=3", 3.0),
        ("train.train_num_steps=100_000", 100_000),
        ("sample.sampler.eta=.inf", float("inf")),
        ("model.qk_norm=yes", True),
        ("model.image_size=[8,16]", [8, 16]),
        ("model.image_size=8", 8),
    ],
)
def test_the_type_of_an_option_decides_how_it_is_read(text, value):
    section, name, *inner = text.partition("=")[0].split(".")
    read = getattr(getattr(load_config(None, [text]), section), name)
    for key in inner:
        read = read[key]
    assert read == value
    assert type(read) is type(value)


# ---- mistakes


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("modle.dim=3", "unknown key modle: did you mean model?"),
        ("model.dimm=3", "unknown key model.dimm: did you mean model.dim?"),
        ("train.lr=3", "unknown key train.lr: did you mean train.train_lr?"),
        ("train.train_rl=3", "unknown key train.train_rl: did you mean train.train_lr?"),
        ("model.train_lr=3", "unknown key model.train_lr: did you mean train.train_lr?"),
        ("depth=3", "unknown key depth: did you mean model.depth?"),
        ("sample.zzzzzz=3", "unknown key sample.zzzzzz: known keys are"),
        ("model=3", "model is a section: write model.key=value"),
        ("model.dim", "write overrides as section.key=value"),
        ("model.dim=wide", "model.dim"),
        ("model.dim=2.5", "model.dim"),
        ("train.train_lr=fast", "train.train_lr"),
        ("train.betas=0.9", "train.betas"),
        ("train.betas=[0.9,x]", "train.betas"),
        ("model.qk_norm=perhaps", "model.qk_norm"),
        ("diffusion.noise_schedule.tau=x", "diffusion.noise_schedule.tau is 'x': it must be a number"),
        (
            "diffusion.noise_shedule={}",
            "diffusion.noise_shedule: did you mean diffusion.noise_schedule?",
        ),
        ("sampel.sampler={}", "unknown key sampel: did you mean sample?"),
        (
            "diffusion.known=[1]",
            "known is a list: it must be a mapping, each value a number",
        ),
        ("model.dim=null", "model.dim"),
        ("model.dim=[", "model.dim=["),
        ("model.dim=007", "model.dim is 007: it must be a whole number"),
        ("model.dim_latent=${model.dim}", "dim_latent is ${model.dim}: it must be a whole number or null"),
        ("model.dim.x=3", "model.dim is a mapping"),
        ("data.path='a'b'", "data.path='a'b': expected '<document start>'"),
        ("model.patch_size=four", "model.patch_size is four: it must be a whole number or a list"),
        ("data.buckets=!!python/object/apply:os.getpid []", "has the tag tag:yaml.org,2002:python/object/apply"),
        ("train.seed=!!int 3", "train.seed has the tag"),
        ("train.optimizer=sgd", "train.optimizer=sgd is unknown: choose adamw, lamb, muon"),
        ("train.train_batch_size=0", "train.train_batch_size is 0: it must be at least 1"),
        ("model.depth=-1", "model.depth is -1"),
        ("model.position=polar", "model.position=polar is unknown: choose learned"),
        ("data.crop=middle", "data.crop=middle is unknown: choose center, random"),
    ],
)
def test_the_error_of_a_wrong_override_is_one_line(override, words):
    with pytest.raises(UsageError) as error:
        load_config("cifar10", [override])
    assert words in one_line(error)


def test_wrong_keys_and_values_in_a_file_name_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    for text, words in (
        ("model: {dimm: 3}", "unknown key model.dimm: did you mean model.dim?"),
        ("trian: {seed: 3}", "unknown key trian: did you mean train?"),
        ("model: {dim: wide}", "wide"),
        ("model: 3", "model is a section"),
        ("- 1\n- 2", "not a mapping of sections"),
        ("model: {dim: [", "mine.yaml"),
        ("model: {dim: 3}\n\tx: 1", "mine.yaml"),
        ("model: {dim: 3, dim: 4}", "the key dim occurs twice"),
        ("model: {[dim]: 3}", "cannot be a key"),
        ("model: !!python/name:os.system {}", "model is a section"),
        ("a: 1\n---\nb: 1", "mine.yaml"),
        ("model: {patch_size: " + "[" * 600 + "]" * 600 + "}", "nested too deeply"),
        ("model: {patch_size: &a [*a]}", "model.patch_size is a list: it must be a whole number"),
        ("model: {patch_size: [&a [1, 1], *a]}", "model.patch_size is a list: it must be a whole number"),
        ("data: {path: !!python/object/apply:os.getpid []}", "data.path has the tag"),
        ("", "not a mapping of sections"),
        ("3", "not a mapping of sections"),
    ):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UsageError) as error:
            load_config(file)
        assert words in one_line(error), text
        assert str(file) in one_line(error), text


def test_a_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(UsageError) as error:
        load_config("cifar11")
    assert "there is no preset and no file cifar11" in one_line(error)
    assert all(name in one_line(error) for name in presets())
    with pytest.raises(UsageError, match=r"missing\.yaml"):
        load_config(tmp_path / "missing.yaml")
    with pytest.raises(UsageError, match="there is no preset and no file"):
        load_config(tmp_path)
    (tmp_path / "picture.yaml").write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"picture\.yaml is not a text file") as error:
        load_config(tmp_path / "picture.yaml")
    one_line(error)


def test_options_given_in_python_are_checked_alike():
    assert model_config(dim=32) == ModelConfig(dim=32)
    assert train_config(train_lr=1.0) == TrainConfig(train_lr=1.0)
    with pytest.raises(UsageError, match=r"RIN: unknown key num_latent: did you mean num_latents\?$"):
        model_config(num_latent=3)
    with pytest.raises(UsageError, match=r"Trainer: unknown key trainlr: did you mean train_lr\?$"):
        train_config(trainlr=3)
    with pytest.raises(UsageError, match=r"Trainer: unknown key dim: did you mean model.dim\?$"):
        train_config(dim=3)


# ---- what it costs


def test_importing_the_configuration_imports_no_torch(tmp_path):
    code = (
        "import sys, rin_video.config_files as c; c.load_config('cifar10', ['model.dim=8']);"
        "print(*{name.split('.')[0] for name in sys.modules} & {'torch', 'numpy', 'timm', 'accelerate', 'PIL', 'av'})"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
