"""The Hub: what is asked of it, and its refusals in one sentence each."""

from __future__ import annotations

import logging
import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)

# seconds between the attempts of a push; the client itself retries every request for about half a minute
WAITS = (2.0, 10.0, 30.0)

# never pushed: what is being written, and the checkpoints, which have a strategy of their own
NOT_PUSHED = ("_*", "checkpoint-*", "*.tmp")


@contextmanager
def told_plainly(repo_or_folder: str | os.PathLike, revision: str | None = None) -> Iterator[None]:
    """Inside, what the Hub and its client refuse, and files that cannot be read, become a ValueError of one sentence."""
    from huggingface_hub.errors import HfHubHTTPError
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, HfHubHTTPError, SafetensorError) as error:
        message = _in_one_sentence(error, repository_name(repo_or_folder), revision)
        if message is None:
            raise
        raise ValueError(message) from None


def repository_name(repo_or_folder: str | os.PathLike) -> str:
    """A folder of the cache by the repository that people know it as; others as they are."""
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots", str(repo_or_folder))
    return f"{cached[1]}/{cached[2]}" if cached else str(repo_or_folder)


def _in_one_sentence(error: BaseException, repo: str, revision: str | None) -> str | None:
    """None for an error that says nothing about the Hub or a file of it."""
    from huggingface_hub import errors
    from safetensors import SafetensorError

    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:  # transformers wraps what the client said
        seen.append(link)
        link = link.__cause__ or link.__context__

    def first(kind) -> BaseException | None:
        return next((one for one in seen if isinstance(one, kind)), None)

    if first(SafetensorError):
        return f"the weights of {repo} must be whole safetensors files, got a torn one ({first(SafetensorError)}); download them again, or take another checkpoint."
    if first(errors.GatedRepoError):
        return f"{repo} must be open to you, got a gated repository; ask for access on its page, then log in with `hf auth login`."
    if first(errors.RevisionNotFoundError):
        return f"revision must be a branch, tag or commit of {repo}, got {revision!r}; its page lists them."
    if first(errors.HFValidationError) or first(errors.RepositoryNotFoundError):
        return f"a checkpoint must be a folder, or a repository of the Hub that you may read, got {repo!r}; look at the name, or log in with `hf auth login` if it is private."
    refused = first(errors.HfHubHTTPError)
    if refused is not None and getattr(refused.response, "status_code", None) == 401:
        return f"the Hub must know your token, got one that it refuses for {repo}; log in anew with `hf auth login`, or mend HF_TOKEN."
    text = str(error)
    if "trust_remote_code=True" in text:
        return f"{repo} must be a network that transformers knows, got one with code of its own, which is not run; read it, then pass trust_remote_code=True if you trust it."
    if "safetensors" in text and ("does not appear to have a file" in text or "no file named" in text):
        return f"{repo} must hold its weights as safetensors, got none; pickled weights can run code and are not loaded: convert them, or take another revision."
    if first(errors.LocalEntryNotFoundError) or first(errors.OfflineModeIsEnabled):
        return (
            f"{repo} must be in the cache or within reach, got no answer from the Hub; look at the network, HF_ENDPOINT and HF_HUB_OFFLINE."
        )
    if "load image processor" in text:
        return f"{repo} must hold an image processor, got no readable preprocessor_config.json; save one beside the weights, or take another checkpoint."
    missing = first(errors.EntryNotFoundError)
    if missing is not None:
        return (
            f"{repo} must be a checkpoint, got a repository without one of its files ({str(missing).splitlines()[-1]}); look at its page."
        )
    return None


def download(repo: str, name: str, **hub) -> Path:
    """The path of one file of a repository."""
    from huggingface_hub import hf_hub_download

    with told_plainly(repo, hub.get("revision")):
        return Path(hf_hub_download(repo, name, **hub))


def download_all(repo: str, patterns: list[str], **hub) -> Path:
    """The folder of a repository's files of these patterns."""
    from huggingface_hub import snapshot_download

    with told_plainly(repo, hub.get("revision")):
        return Path(snapshot_download(repo, allow_patterns=patterns, **hub))


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
