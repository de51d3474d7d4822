"""Saved models on the Hugging Face Hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors
from tqdm import tqdm

from reclip_d2.errors import ReclipError
from reclip_d2.workspace.saved_model import CARD, CONFIG_YAML, WEIGHTS

# Nothing else of a repository is downloaded: no pickles, no code.
_PATTERNS = ["*.json", CONFIG_YAML, WEIGHTS, CARD]

# Libraries that huggingface_hub uses or has used for requests: their errors are network errors.
_NETWORK = ("httpx", "httpcore", "requests", "urllib3")


class _NoBar(tqdm):
    """An invisible progress bar."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "disable": True})


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local folder of a model on the Hub, downloaded unless it is in the cache.

    Args:
        revision: branch, tag or commit; None for the main branch.
        token: the user's token; None for the one saved by ``hf auth login``.
        cache_dir: cache of huggingface_hub; None for its default.
        local_files_only: download nothing; ``HF_HUB_OFFLINE=1`` does the same.

    Raises:
        ReclipError: there is no such model, or it cannot be downloaded.
    """
    with _hub_errors(repo_id, revision):
        return Path(
            huggingface_hub.snapshot_download(
                repo_id,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=_PATTERNS,
                library_name="reclip_d2",
                tqdm_class=_NoBar,
            )
        )


def upload(
    folder: Path,
    repo_id: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    commit_message: str = "Upload a reclip_d2 model",
    create_pr: bool = False,
) -> str:
    """Upload a saved model to the Hub, creating the repository if necessary; returns the commit's address.

    Args:
        private: whether a new repository is private; None for the account's default.
        create_pr: open a pull request instead of committing to ``revision``.

    Raises:
        ReclipError: it cannot be uploaded.
    """
    api = huggingface_hub.HfApi(token=token, library_name="reclip_d2")
    with _hub_errors(repo_id, revision):
        api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
            allow_patterns=_PATTERNS,
        )
    return str(commit.commit_url)


@contextlib.contextmanager
def _hub_errors(repo_id: str, revision: str | None) -> Iterator[None]:
    """Turn errors of the Hub or the network into one line."""
    where = f"{repo_id!r} on the Hugging Face Hub"
    try:
        yield
    except errors.HFValidationError as error:
        raise ReclipError(f"{repo_id!r} is neither a folder nor a name on the Hugging Face Hub (USER/NAME)") from error
    except errors.RevisionNotFoundError as error:
        raise ReclipError(f"{where} has no revision {revision!r}: give a branch, a tag or a commit") from error
    except errors.GatedRepoError as error:
        raise ReclipError(f"{where} is gated: request access there, then run hf auth login, or give token=") from error
    except errors.RepositoryNotFoundError as error:
        raise ReclipError(
            f"there is no folder and no model {where}, or it is private: check the name, run hf auth login, or give"
            " token="
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise ReclipError(
            f"{where} is not completely in the local cache, and cannot be downloaded (offline, or local_files_only):"
            " download it on a machine with a network, and copy the folder"
        ) from error
    except Exception as error:
        known = isinstance(error, errors.HfHubHTTPError | errors.LocalTokenNotFoundError)
        if not known and type(error).__module__.partition(".")[0] not in _NETWORK:
            raise
        cause = " ".join(str(error).split())[:200] or type(error).__name__
        raise ReclipError(f"{where} cannot be reached ({cause}): check the network and your token") from error
