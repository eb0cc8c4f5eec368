"""Files of other people, and names with meaning to a parser, are displayed and have no effect."""

import json
import os
import shutil
import sys
from html.parser import HTMLParser

import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image
from tiny_run import TINY

from rin_video import RIN, UsageError, cli
from rin_video.config import Config
from rin_video.config_files import load_config, to_yaml
from rin_video.datasets import hub
from rin_video.datasets.captions import TextEncoder
from rin_video.reports.card import model_card
from rin_video.reports.page import write_report
from rin_video.training.metrics import read_lines
from rin_video.training.provenance import read_json
from rin_video.weights import save_model

NAMES = ["${oc.env:HOME}", "???", "null", "1e3", "a: b", "' #x", " [y]", "😀 &z"]
if os.name == "nt":  # it does not allow such names
    NAMES = [name for name in NAMES if not set(name) & set('?:"*<>|')]
TITLE = "$title & model" if os.name == "nt" else "<b>$title & model"
SMALL = [f"model.{name}={value}" for name, value in TINY.items() if name != "image_size"]
SMALL += ["sample.steps=1", "sample.num_samples=2", "data.num_workers=0"]
MARKUP = [
    "|", "<script>alert(1)</script>", "```", "![x](http://x.y/z.png)", "[x](javascript:alert(1))", "a\n\n# b", "*a*",
    "_a_", "<!--", "www.x.y", "http://x.y", "a@x.y", "\\", "\\|", "$x$", "\\(x\\)", "&lt;", "&#124;", "~~a~~", "`a",
    ":smile:", "#1", "~~~", "---", "</code>", "\udcff", "\x1b[2J", "${oc.env:SECRET}",
]  # fmt: skip


class Page(HTMLParser):
    """A parser that records the tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Four pictures in the folder `data` of the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for i in range(4):
        Image.new("RGB", (8, 8), (60 * i, 0, 0)).save(tmp_path / "data" / f"{i}.png")
    return tmp_path


@pytest.fixture
def model(tmp_path, monkeypatch):
    """The folder of a model whose classes are named `MARKUP`, with the files of a run."""
    monkeypatch.setenv("SECRET", "hunter2")
    folder = tmp_path / TITLE
    config = Config()
    config.data.path, config.data.classes = "somewhere/a | <i>*b*\n```", MARKUP
    config.model = RIN(**TINY, num_classes=len(MARKUP)).config
    save_model(folder, RIN(config.model), config)
    rate = {"lr": 1e-3, "grad_norm": None, "samples_per_second": 2.0, "loss_by_t": [1.0] * 10}
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0} | rate))
    (folder / "run.json").write_text(
        json.dumps(dict.fromkeys(("device", "started", "<b>"), "<img src=x onerror=alert(1)> | [x](http://x.y)")
                   | {"versions": {"torch": "<b>2</b> ![x](http://x.y)"}, "data": "\udcff$x\n", "system": [1, None]})
    )  # fmt: skip
    return folder


# ---- names


def train_in(name, run, classes):
    """Train, resume, sample and report."""
    for kind in classes:
        shutil.copytree("data", os.path.join(name, kind))
    train = ["train", "--data", name, "--size", "8", "--batch-size", "2", "--out", run, *SMALL]
    for steps in ("1", "2"):
        assert cli.main([*train, "--steps", steps]) == 0
        with open(os.path.join(run, "config.yaml"), encoding="utf-8") as file:
            data = yaml.safe_load(file)["data"]
        assert (data["path"], data["classes"]) == (name, sorted(classes))
        assert load_config(os.path.join(run, "config.yaml")).data.path == name
    with open(os.path.join(run, "metrics.jsonl"), encoding="utf-8") as file:
        assert [json.loads(line)["step"] for line in file] == [1, 2]
    assert cli.main(["sample", run, "--class", classes[-1], "--num", "1"]) == 0
    assert os.path.isfile(os.path.join(run, "samples.png"))
    assert cli.main(["report", run]) == 0
    with open(os.path.join(run, "report.html"), encoding="utf-8") as file:
        assert f"{run}: training of a RIN" in Page(file.read()).words


def test_folders_of_such_names_are_trained_on_and_written_to(pictures):
    train_in(NAMES[0], NAMES[1], NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_folders_of_each_such_name_are_trained_on_and_written_to(name, pictures):
    train_in(name, f"{name}.run", ["other", name])


def test_other_commands_accept_folders_of_such_names(pictures, capsys):
    for name in NAMES:
        shutil.copytree("data", name)
        assert cli.main(["index", name, "--out", f"{name}.jsonl"]) == 0
        assert f"index: {name}.jsonl" in capsys.readouterr().out
        assert cli.main(["peek", "data", "--size", "8", "--frames", "0", f"data.images={name}"]) == 2 * (name != "null")
        assert "(--images) is mixed with clips" in capsys.readouterr().err or name == "null"


# ---- configurations


@pytest.mark.parametrize("command", ["train", "peek", "diagnose"])
def test_a_configuration_cannot_run_commands(command, pictures, capfd):
    """`data.images` or `data.path` in a config file is a command, and the file claims to allow it."""
    config = Config(model=RIN(**TINY).config)
    config.data.path = f"pipe:echo x > {pictures / 'executed'}"
    save_model(pictures / "model", RIN(config.model), config)
    text = (pictures / "model/config.yaml").read_text(encoding="utf-8")
    (pictures / "model/config.yaml").write_text(
        text.replace("data:\n", "data:\n  allow_pipe: true\n"), encoding="utf-8"
    )
    hostile = {"data": {"images": config.data.path, "allow_pipe": True}, "model": TINY | {"patch_size": [2, 4, 4]}}
    (pictures / "hostile.yaml").write_text(yaml.safe_dump(hostile), encoding="utf-8")
    frames = [Image.new("RGB", (8, 8), (60 * i, 0, 0)) for i in range(4)]
    frames[0].save("data/0.gif", save_all=True, append_images=frames[1:])
    given = ["--config", "hostile.yaml", "--frames", "4"]
    argv = {
        "train": ["train", "--data", "data", *given, "--out", "run"],
        "peek": ["peek", "data", *given],
        "diagnose": ["diagnose", "model"],
    }[command]
    assert cli.main(argv) == 2
    assert "allow it with data.allow_pipe=true on the command line" in capfd.readouterr().err
    assert not (pictures / "executed").exists()
    assert cli.main([*argv, "data.allow_pipe=true"]) == 2  # the shard is empty, or there is no folder for shards
    assert "allow_pipe" not in capfd.readouterr().err
    assert (pictures / "executed").exists() == (command == "train")


def test_only_people_allow_commands(tmp_path):
    (tmp_path / "mine.yaml").write_text("data: {allow_pipe: true, stride: 2}", encoding="utf-8")
    assert not load_config(tmp_path / "mine.yaml").data.allow_pipe
    assert load_config(tmp_path / "mine.yaml").data.stride == 2
    allowed = load_config(tmp_path / "mine.yaml", ["data.allow_pipe=true"])
    assert allowed.data.allow_pipe
    assert "allow_pipe" not in to_yaml(allowed)  # the resuming command must repeat the permission


def test_nothing_is_resolved(model, tmp_path, monkeypatch):
    """Secrets in the environment are not read, so they cannot be published."""
    (tmp_path / "mine.yaml").write_text("data: {path: '${oc.env:SECRET}', images: \"${env:SECRET}\"}", encoding="utf-8")
    config = load_config(tmp_path / "mine.yaml", ["data.text_encoder=${oc.env:SECRET}", "train.init_from=${data.path}"])
    assert (config.data.path, config.data.images) == ("${oc.env:SECRET}", "${env:SECRET}")
    assert (config.data.text_encoder, config.train.init_from) == ("${oc.env:SECRET}", "${data.path}")
    published = [to_yaml(config), to_yaml(load_config(model / "config.yaml")), model_card(model, "alice/model")]
    published.append(write_report(model, tmp_path / "report.html").read_text(encoding="utf-8"))
    for text in published:
        assert "hunter2" not in text
    assert all("oc.env" in text for text in published)


# ---- what is published


def test_a_card_shows_text_as_it_is(model):
    """Another Markdown parser finds only our tags, links and pictures, and every name in its cell."""
    card = model_card(model, "alice/_a_", license="no")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "no"
    page = Page(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(body))
    assert {tag for tag, _ in page.tags} <= {
        "h1", "h2", "p", "a", "pre", "code", "table", "thead", "tbody", "tr", "th", "td"
    }  # fmt: skip
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == ["https://arxiv.org/abs/2212.11972"]
    assert sum(tag == "pre" for tag, _ in page.tags) == 4
    text = "".join(page.words)
    shown = ["\\udcff" if name == "\udcff" else "a\\n\\n# b" if name[:2] == "a\n" else name for name in MARKUP]
    shown[MARKUP.index("\x1b[2J")] = "\\x1b[2J"
    for words in ("_a_\n", ", ".join(shown), "a | <i>*b*\\n```", "<img src=x onerror=alert(1)> | [x](http://x.y)",
                  "torch <b>2</b> ![x](http://x.y)"):  # fmt: skip
        assert words in text, words
    assert "http\\://x.y" in body  # no parser makes it a link


def test_a_report_shows_text_as_it_is(model, tmp_path):
    page = Page(write_report(model, tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "img", "b", "i"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    text = "".join(page.words)
    for words in (TITLE, "<img src=x onerror=alert(1)>", "<script>alert(1)</script>", "\\udcff$x\\n"):
        assert words in text, words


def test_files_of_a_run_that_hold_something_else(model, tmp_path):
    sound = {"step": 1, "loss": 1.0, "samples_per_second": 1, "loss_by_t": [1] * 10}
    for text in ('{"loss": 1.0}', '{"loss": 1e999}', "[" * 100_000, "3", "\xff", '{"step": "<b>", "loss": 1.0}',
                 '{"loss": [1]}', json.dumps(sound | {"loss_by_t": ["<b>"] * 10}), json.dumps(sound | {"lr": "<b>"}),
                 json.dumps(sound | {"loss_by_t": [1, 2]})):  # fmt: skip
        with (model / "metrics.jsonl").open("a", encoding="latin-1") as file:
            file.write("\n" + text)
        (model / "run.json").write_text(text, encoding="latin-1")
        read_json(model / "run.json")
    assert len(read_lines(model / "metrics.jsonl")) == 1
    (model / "run.json").write_text('{"versions": [1], "earlier": 3, "device": {"a": 1}}')
    write_report(model, tmp_path / "report.html")
    model_card(model, "alice/model")


def test_what_commands_kept_and_somebody_changed(pictures, capfd):
    """An index is created again, and shards are not touched."""
    for text in ("[" * 100_000, "3", "\xff", "{}", "[1]"):
        (pictures / "index.jsonl").write_text(text, encoding="latin-1")
        assert cli.main(["index", "data", "--out", "index.jsonl"]) == 0
        (pictures / "shards").mkdir(exist_ok=True)
        (pictures / "shards/prepare.json").write_text(text, encoding="latin-1")
        assert cli.main(["prepare", "data", "--size", "8", "--out", "shards"]) == 2
        assert "use another --out" in capfd.readouterr().err


def test_an_error_is_one_line_that_a_terminal_can_show(model, capfd):
    assert cli.main(["sample", str(model), "--class", "none of them"]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "\x1b" not in said
    assert "a\\n\\n# b" in said


# ---- code


def test_a_text_encoder_runs_no_code_of_its_own(tmp_path, monkeypatch):
    """The folder contains code, and the user answers yes to every question."""
    here = os.path.realpath(os.getcwd())  # where `tokenizers` is our package
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if os.path.realpath(entry or ".") != here])
    pytest.importorskip("transformers")
    monkeypatch.setattr("builtins.input", lambda *words: "y")
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()\nclass Mine: pass\n")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine"}))
    about = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["code.Mine", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    with pytest.raises(UsageError, match=r"cannot be read as a text encoder \(.*custom code"):
        TextEncoder(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_hub_data_set_runs_no_code_of_its_own(monkeypatch):
    asked = []

    class Hub:
        def load_dataset(self, name, **options):
            asked.append(options)

    monkeypatch.setattr(hub, "import_hub", Hub)
    hub.load_table("hf:mallory/data:train")
    assert asked == [{"split": "train", "trust_remote_code": False}]
