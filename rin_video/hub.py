"""Fetching models from the Hugging Face hub: the two files of a model, and nothing else of a repository."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rin_video.config_files import load_config
from rin_video.errors import UsageError, first_line
from rin_video.files import CONFIG, HUB, WEIGHTS

HUB_ID = re.compile(r"^(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?$")


def fetch(source: str | os.PathLike[str]) -> Path:
    """A folder with the two files of the model `user/name`, or of its revision, `user/name@revision`.

    Nothing else of the repository is fetched, and the weights only where there is a configuration. What was fetched
    before is not fetched again, and serves without a network. `hf:` in front says that it is no folder. Raises
    `UsageError` where there is no such repository, no access, no network, or it holds no model of ours.
    """
    match = HUB_ID.match(os.fspath(source).removeprefix(HUB))
    if match is None:
        raise UsageError(f"no folder is called {source}: give the folder of a run, or a hub id user/name")
    repo, revision = match["repo"], match["revision"]
    if not os.fspath(source).startswith(HUB) and Path(repo).parent.is_dir():
        raise UsageError(f"{Path(repo).parent} holds no folder {Path(repo).name}: for the hub, write {HUB}{source}")
    from huggingface_hub import HfApi

    with plain_errors(repo, revision, "fetched"):
        config = Path(HfApi().hf_hub_download(repo, CONFIG, revision=revision))
    try:
        load_config(config)
    except UsageError as error:
        raise UsageError(f"{repo} on the hub holds no model of rin-video: {error}") from None
    with plain_errors(repo, revision, "fetched"):
        # Of the same commit, whatever was pushed in between: the folder is called by it.
        weights = Path(HfApi().hf_hub_download(repo, WEIGHTS, revision=config.parent.name))
    return weights.parent


@contextmanager
def plain_errors(repo: str, revision: str | None, done: str) -> Iterator[None]:
    """Turns what the hub and the network answer into one line that says what to do."""
    from huggingface_hub import errors

    try:
        yield
    except UsageError:
        raise
    except errors.GatedRepoError:
        reason = "its owner grants access one by one: ask for it on its page, then `hf auth login`"
    except errors.RepositoryNotFoundError as error:
        reason = (
            "the hub wants to know who you are: `hf auth login`, or set HF_TOKEN"
            if status_of(error) == 401 and done != "fetched"
            else "no such repository, or a private one: look at the spelling; for a private one, `hf auth login`"
        )
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision}: leave out @{revision}, or give a branch, a tag or a commit"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else "no network"
        reason = f"the hub cannot be reached ({offline}), and it was not fetched before: try again with a network"
    except errors.EntryNotFoundError:
        reason = f"it holds no {CONFIG} or no {WEIGHTS}: it is no model of rin-video"
    except errors.HFValidationError as error:
        reason = first_line(error)
    except Exception as error:  # whatever the library under huggingface_hub raises: it has changed before
        status = status_of(error)
        if status in (401, 403):
            reason = "your token does not allow it: use one that may write there (`hf auth login`), or another name"
        elif status:
            reason = f"the hub answered {first_line(error)}"
        else:
            reason = f"the hub cannot be reached ({first_line(error)}): try again with a network"
    else:
        return
    raise UsageError(f"{repo} could not be {done}{' the hub' if done != 'fetched' else ''}: {reason}") from None


def status_of(error: BaseException) -> int | None:
    """The status of an answer that became an error."""
    return getattr(getattr(error, "response", None), "status_code", None)
