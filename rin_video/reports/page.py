"""`rin-video report`: writes a run as one self-contained HTML page."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from string import Template
from typing import Any

from rin_video.errors import UsageError, one_line
from rin_video.files import CONFIG, write_text
from rin_video.reports.results import HEADINGS, describe_measurement, results_of, score_rows, warnings_of
from rin_video.training.metrics import read_lines, read_validation
from rin_video.training.plots import metrics_svg, validation_svg
from rin_video.training.provenance import read_json
from rin_video.training.validation import find_overfitting

KINDS = {".mp4": "video/mp4", ".gif": "image/gif", ".png": "image/png"}
SHOWN = 8  # maximum number of steps whose samples are on the page

PAGE = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222; }
  h1 { margin-bottom: 0; } h2 { border-bottom: 1px solid #ddd; margin-top: 2.5rem; }
  figure { display: inline-block; margin: 0 1rem 1rem 0; vertical-align: top; }
  figcaption { color: #666; } video, figure img { max-width: 500px; min-width: 240px; image-rendering: pixelated; }
  svg { width: 100%; height: auto; } table { border-collapse: collapse; }
  td, th { padding: .1rem 1.5rem .1rem 0; text-align: left; }
  pre { background: #f6f6f6; overflow: auto; padding: 1rem; }
</style></head><body>
<h1>$title</h1>
<p>$summary</p>
<h2>Curves</h2>
$curves
<h2>Samples over time</h2>
$samples
<h2>Scores</h2>
$scores
<h2>Versions and hardware</h2>
<table>$facts</table>
<h2>Configuration</h2>
<pre>$config</pre>
</body></html>
"""
)


def write_report(run: Path, path: Path) -> Path:
    """Write the page of the run in folder `run`; return `path`. Raises `UsageError` if the folder has no metrics."""
    lines = read_lines(run / "metrics.jsonl")
    if not lines:
        raise UsageError(f"{run} has no metrics.jsonl: pass the folder of a run, which `rin-video train --out` wrote")
    made = read_json(run / "run.json")
    config = run / CONFIG
    last = lines[-1]
    write_text(
        path,
        PAGE.substitute(
            title=escape(f"{run.resolve().name}: training of a RIN"),
            summary=escape(
                f"Step {last['step']:,}, loss {last['loss']:.4f}, {last['samples_per_second']:.1f} samples/s; "
                f"started {made.get('started', 'at an unknown time')}{describe_earlier(made.get('earlier'))}."
            ),
            curves=metrics_svg(lines) + held_out(read_validation(run / "metrics.jsonl")),
            samples="\n".join(figures(run / "samples")) or "<p>none yet</p>",
            scores="\n".join(map(score_table, results_of(run))) or "<p>none yet: rin-video evaluate measures them</p>",
            facts="".join(fact(name, value) for name, value in made.items() if value is not None and name != "earlier"),
            config=html.escape(
                config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "not written yet"
            ),
        ),
    )
    return path


def score_table(result: dict[str, Any]) -> str:
    """Return the protocol, the scores and the warnings of an evaluation as HTML."""
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in score_rows(result))
    titles = "".join(f"<th>{title}</th>" for title in HEADINGS)
    warnings = "".join(f"<li>{escape(text)}</li>" for text in warnings_of(result))
    return f"<p>{escape(describe_measurement(result))}</p>\n<table><tr>{titles}</tr>{rows}</table>" + (
        f"\n<ul>{warnings}</ul>" if warnings else ""
    )


def held_out(rows: list[dict[str, Any]]) -> str:
    """Return the curves of the validation loss as HTML, with its lowest value, and overfitting if there is some."""
    if not rows:
        return ""
    best, last = min(rows, key=lambda row: row["validation_loss"]), rows[-1]
    words = (
        f"Validation loss {last['validation_loss']:.4g} at step {last['step']:,} (training samples: "
        f"{last['train_loss_fixed']:.4g}); the lowest was {best['validation_loss']:.4g} at step {best['step']:,}."
    )
    found = find_overfitting(rows)
    more = f"\n<p>{escape(found.describe())}</p>" if found else ""
    return f"\n<h2>Held-out data</h2>\n<p>{escape(words)}</p>{more}\n{validation_svg(rows)}"


def describe_earlier(starts: Any) -> str:
    """Describe how often a run was resumed; the text is empty if it never was."""
    count = len(starts) if isinstance(starts, list) else 0
    if not count:
        return ""
    first = starts[0].get("started", "an unknown time") if isinstance(starts[0], dict) else "an unknown time"
    return f", resumed {'once' if count == 1 else f'{count} times'} (first start {first})"


def escape(text: str) -> str:
    """Escape text for one line of HTML."""
    return html.escape(one_line(text))


def figures(folder: Path) -> list[str]:
    """Return the samples of at most `SHOWN` steps, evenly spaced over the training, as HTML figures."""
    files: dict[int, dict[str, Path]] = {}
    for path in sorted(folder.glob("step-*"), key=lambda path: path.suffix == ".mp4"):  # a clip replaces its sheet
        step, _, kind = path.stem.removeprefix("step-").partition("-")
        if path.suffix in KINDS and step.isdecimal():
            files.setdefault(int(step), {})[kind] = path
    steps = sorted(files)
    count = min(SHOWN, len(steps))
    chosen = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
    return [figure(step, path) for step in chosen for _, path in sorted(files[step].items())]


def figure(step: int, path: Path) -> str:
    """Return an HTML figure that embeds an image or a video."""
    kind = KINDS[path.suffix]
    data = f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    media = (
        f'<video src="{data}" autoplay loop muted playsinline controls></video>'
        if kind.startswith("video")
        else f'<img src="{data}" alt="samples at step {step}">'
    )
    return f"<figure>{media}<figcaption>step {step:,}</figcaption></figure>"


def fact(name: str, value: Any) -> str:
    """Return an HTML table row; dicts and lists become text."""
    text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else value
    text = " ".join(map(str, text)) if isinstance(text, list) else text
    return f"<tr><td>{escape(name)}</td><td>{escape(str(text))}</td></tr>"
