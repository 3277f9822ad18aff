"""Pushing to the Hub."""

from __future__ import annotations

import logging
import os
import shlex
import time
from pathlib import Path

logger = logging.getLogger(__name__)

# seconds between the attempts of a push; the client itself retries every request for about half a minute
WAITS = (2.0, 10.0, 30.0)


# never pushed: what is being written, and the checkpoints, which have a strategy of their own
NOT_PUSHED = ("_*", "checkpoint-*", "*.tmp")


def check_token(token: str | None = None) -> None:
    """Refuses, before hours of training, a push that could not be made after them."""
    from huggingface_hub import HfApi, errors

    way_out = "log in with `hf auth login`, set HF_TOKEN, or leave out push_to_hub."
    try:
        who = HfApi(token=token).whoami()
    except errors.LocalTokenNotFoundError:
        raise ValueError(f"push_to_hub needs a token of the Hub, got none; {way_out}") from None
    except errors.HfHubHTTPError as error:
        raise ValueError(f"push_to_hub needs a token that the Hub accepts, got {_short(error)!r}; {way_out}") from None
    except Exception as error:
        raise ValueError(f"push_to_hub needs the Hub within reach, got {_short(error)!r}; {way_out}") from None
    if who.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"push_to_hub needs a token that may write, got one of {who.get('name')} that may read; {way_out}")


def push_folder(
    repo: str,
    folder: str | os.PathLike,
    message: str,
    *,
    token: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
):
    """Uploads a folder, in four attempts. Raises ConnectionError, with the command to do it by hand, when all fail."""
    from huggingface_hub import HfApi, errors

    for wait in (*WAITS, None):
        try:
            return HfApi(token=token).upload_folder(
                repo_id=repo, folder_path=folder, commit_message=message, revision=revision, ignore_patterns=list(NOT_PUSHED)
            )
        except Exception as error:
            refused = (
                isinstance(error, errors.HfHubHTTPError)
                and error.response is not None
                and error.response.status_code in (400, 401, 403, 404)
            )
            if wait is None or refused:
                raise ConnectionError(
                    f"the push to {repo} must reach the Hub, got {_short(error)!r}; everything is in {folder}, push it with:\n"
                    + by_hand(repo, folder, revision=revision, private=private)
                ) from error
            logger.warning("the push to %s failed (%s); trying again in %.0f seconds", repo, _short(error), wait)
            time.sleep(wait)


def by_hand(repo: str, folder: str | os.PathLike, *, revision: str | None = None, private: bool | None = None) -> str:
    """The command that pushes a folder."""
    words = ["hf", "upload", repo, str(Path(folder).absolute()), "."]
    words += [word for pattern in NOT_PUSHED for word in ("--exclude", pattern)]
    words += ["--revision", revision] if revision else []
    words += ["--private"] if private else []
    return shlex.join(words)


def without_secrets(argv: list[str]) -> list[str]:
    """A command line that may be published: tokens are left out."""
    kept, secret = [], False
    for word in argv:
        if secret and not word.startswith("--"):
            secret = False
            continue
        name, has_value, _ = word.partition("=")
        secret = name.startswith("--") and name.endswith("token") and not has_value
        if not (name.startswith("--") and name.endswith("token")):
            kept.append(word)
    return kept


def _short(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
