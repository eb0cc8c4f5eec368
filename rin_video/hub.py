"""Downloads models from the Hugging Face hub: the two files of a model and nothing else of its repository."""

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
    """Download the two files of the model `user/name`, or of a revision, `user/name@revision`; return their folder.

    The weights are downloaded only if the repository has a valid config. Downloaded files are cached and work offline.
    The prefix `hf:` states that the source is not a folder. Raises `UsageError` if there is no such repository, no
    access or no network, or if the repository holds no model of rin-video.
    """
    match = HUB_ID.match(os.fspath(source).removeprefix(HUB))
    if match is None:
        raise UsageError(f"there is no folder {source}: pass the folder of a run, or a hub id user/name")
    repo, revision = match["repo"], match["revision"]
    if not os.fspath(source).startswith(HUB) and Path(repo).parent.is_dir():
        raise UsageError(f"{Path(repo).parent} has no folder {Path(repo).name}: for the hub, write {HUB}{source}")
    from huggingface_hub import HfApi

    with plain_errors(repo, revision, "fetched"):
        config = Path(HfApi().hf_hub_download(repo, CONFIG, revision=revision))
    try:
        load_config(config)
    except UsageError as error:
        raise UsageError(f"{repo} on the hub is not a model of rin-video: {error}") from None
    with plain_errors(repo, revision, "fetched"):
        # The folder is named after the commit; use the same one, even if another was pushed in the meantime.
        weights = Path(HfApi().hf_hub_download(repo, WEIGHTS, revision=config.parent.name))
    return weights.parent


@contextmanager
def plain_errors(repo: str, revision: str | None, done: str) -> Iterator[None]:
    """Convert errors of the hub and the network to a one-line `UsageError` with a remedy.

    `done` completes the sentence "REPO could not be ...": "fetched", or a verb with its preposition ("pushed to").
    """
    from huggingface_hub import errors

    try:
        yield
    except UsageError:
        raise
    except errors.GatedRepoError:
        reason = "its owner approves access requests: request access on its page, then run `hf auth login`"
    except errors.RepositoryNotFoundError as error:
        reason = (
            "the hub requires you to log in: run `hf auth login`, or set HF_TOKEN"
            if status_of(error) == 401 and done != "fetched"
            else "it does not exist or is private: check the spelling; if it is private, run `hf auth login`"
        )
    except errors.RevisionNotFoundError:
        reason = f"it has no revision {revision}: leave out @{revision}, or pass a branch, a tag or a commit"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        offline = "HF_HUB_OFFLINE is set" if isinstance(error, errors.OfflineModeIsEnabled) else "no network"
        reason = f"the hub cannot be reached ({offline}), and it is not in the cache: try again with a network"
    except errors.EntryNotFoundError:
        reason = f"it lacks {CONFIG} or {WEIGHTS}: it is not a model of rin-video"
    except errors.HFValidationError as error:
        reason = first_line(error)
    except Exception as error:  # the HTTP library of huggingface_hub, and its errors, have changed before
        status = status_of(error)
        if status in (401, 403):
            reason = "your token has no permission: use one with write access (`hf auth login`), or another name"
        elif status:
            reason = f"the hub responded with {first_line(error)}"
        else:
            reason = f"the hub cannot be reached ({first_line(error)}): try again with a network"
    else:
        return
    raise UsageError(f"{repo} could not be {done}{' the hub' if done != 'fetched' else ''}: {reason}") from None


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status code of an error, or None."""
    return getattr(getattr(error, "response", None), "status_code", None)
