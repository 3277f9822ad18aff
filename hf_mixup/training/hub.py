"""Pushing to the Hub."""

from __future__ import annotations

import logging
import os
import shlex
import time
from pathlib import Path

from hf_mixup.core.secrets import redacted, without_secrets

__all__ = ["NOT_PUSHED", "WAITS", "by_hand", "check_token", "push_dataset", "push_folder", "without_secrets"]

logger = logging.getLogger(__name__)

# seconds between the attempts of a push; the Hub's client also retries every request for about half a minute
WAITS = (2.0, 10.0, 30.0)


# never pushed: files that are being written, and checkpoints, which are pushed by `hub_strategy`
NOT_PUSHED = ("_*", "checkpoint-*", "*.tmp")


def check_token(token: str | None = None) -> None:
    """Checks before training that the push after it can succeed. Raises ValueError."""
    from huggingface_hub import HfApi, errors

    way_out = "log in with `hf auth login`, set HF_TOKEN, or leave out push_to_hub."
    try:
        who = HfApi(token=token).whoami()
    except errors.LocalTokenNotFoundError:
        raise ValueError(f"push_to_hub needs a token of the Hub, got none; {way_out}") from None
    except errors.HfHubHTTPError as error:
        raise ValueError(f"push_to_hub needs a token that the Hub accepts, got {_short(error)!r}; {way_out}") from None
    except Exception as error:
        raise ValueError(f"push_to_hub must be able to reach the Hub, got {_short(error)!r}; {way_out}") from None
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"push_to_hub needs a token with write access, got one of {who.get('name')} with read access; {way_out}")


def push_folder(
    repo: str,
    folder: str | os.PathLike,
    message: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    repo_type: str = "model",
):
    """Uploads a folder to an existing repository, with up to four attempts if the network or the server fails.

    Args:
        repo: Hub id.
        message: of the commit.
        token, revision, private: as in `huggingface_hub`; `private` is only for the command in the error.
        repo_type: `model` or `dataset`.

    Raises:
        ValueError: for a folder that does not exist.
        ConnectionError: if the Hub refuses, or all attempts fail. It has the command to push by hand.
    """
    from huggingface_hub import HfApi, errors

    if not Path(folder).is_dir():
        raise ValueError(f"push needs an existing folder, got {str(folder)!r}; check the path.")
    for wait in (*WAITS, None):
        try:
            return HfApi(token=token).upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=message,
                revision=revision,
                ignore_patterns=list(NOT_PUSHED),
                repo_type=repo_type,
            )
        except Exception as error:
            again = _passes(error)
            if not again and not isinstance(error, (errors.HfHubHTTPError, OSError)):
                raise  # not an error of the Hub or the network
            if wait is None or not again:
                raise ConnectionError(
                    f"the push to {repo} must reach the Hub, got {_short(error)!r}; everything is in {folder}, push it with:\n"
                    + by_hand(repo, folder, revision=revision, private=private, repo_type=repo_type)
                ) from error
            logger.warning("the push to %s failed (%s); trying again in %.0f seconds", repo, _short(error), wait)
            time.sleep(wait)


def _passes(error: Exception) -> bool:
    """Whether another attempt may succeed: the server is busy or fails, or the connection broke."""
    from huggingface_hub import errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return False
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        return error.response.status_code in (408, 425, 429) or error.response.status_code >= 500
    # connection errors of the client, httpx, which may be installed under another name
    return isinstance(error, (ConnectionError, TimeoutError)) or type(error).__module__.split(".")[0] in ("httpx", "httpx2", "httpcore")


def push_dataset(repo: str, folder: str | os.PathLike, message: str, *, token: str | None = None) -> str:
    """Uploads a folder as a data set, creates it if needed, and returns its address. Raises the errors of `push_folder`."""
    from huggingface_hub import HfApi

    made = HfApi(token=token).create_repo(repo, repo_type="dataset", exist_ok=True)
    push_folder(made.repo_id, folder, message, token=token, repo_type="dataset")
    return str(made)


def by_hand(
    repo: str, folder: str | os.PathLike, *, revision: str | None = None, private: bool | None = None, repo_type: str = "model"
) -> str:
    """The shell command that pushes a folder to `repo`, with the same arguments as `push_folder`."""
    words = ["hf", "upload", repo, str(Path(folder).absolute()), "."]
    words += [word for pattern in NOT_PUSHED for word in ("--exclude", pattern)]
    words += ["--revision", revision] if revision else []
    words += ["--private"] if private else []
    words += ["--repo-type", repo_type] if repo_type != "model" else []
    return shlex.join(words)


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return redacted((lines[-1] if lines else type(error).__name__).rstrip("."))
