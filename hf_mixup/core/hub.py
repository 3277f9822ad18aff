"""Reading from the Hub, with its errors in one sentence each."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

logger = logging.getLogger(__name__)


@contextmanager
def told_plainly(repo_or_folder: str | os.PathLike, revision: str | None = None) -> Iterator[None]:
    """Context manager: turns errors of the Hub, and of unreadable files, into a one-sentence ValueError."""
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
    """The repository name of a folder in the cache; other names are returned as they are."""
    cached = re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots", str(repo_or_folder))
    return f"{cached[1]}/{cached[2]}" if cached else str(repo_or_folder)


def _in_one_sentence(error: BaseException, repo: str, revision: str | None) -> str | None:
    """The error as one sentence; None if it is not about the Hub or one of its files."""
    from huggingface_hub import errors
    from safetensors import SafetensorError

    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:  # transformers wraps the client's error
        seen.append(link)
        link = link.__cause__ or link.__context__

    def first(kind) -> BaseException | None:
        return next((one for one in seen if isinstance(one, kind)), None)

    if first(SafetensorError):
        return f"the weights of {repo} must be whole safetensors files, got an incomplete or corrupted one ({first(SafetensorError)}); download them again, or take another checkpoint."
    if first(errors.GatedRepoError):
        return f"{repo} must be open to you, got a gated repository; ask for access on its page, then log in with `hf auth login`."
    if first(errors.RevisionNotFoundError):
        return f"revision must be a branch, tag or commit of {repo}, got {revision!r}; its page lists them."
    if first(errors.HFValidationError) or first(errors.RepositoryNotFoundError):
        return f"a checkpoint must be a folder, or a repository of the Hub that you may read, got {repo!r}; check the spelling, or log in with `hf auth login` if it is private."
    refused = first(errors.HfHubHTTPError)
    if refused is not None and getattr(refused.response, "status_code", None) == 401:
        return f"the Hub must know your token, got one that it refuses for {repo}; log in again with `hf auth login`, or correct HF_TOKEN."
    text = str(error)
    if "trust_remote_code=True" in text:
        return f"{repo} must be a network that transformers knows, got one with its own code, which is not run; read that code, then pass trust_remote_code=True if you trust it."
    if "safetensors" in text and ("does not appear to have a file" in text or "no file named" in text):
        return f"{repo} must hold its weights as safetensors, got none; pickled weights can run code and are not loaded: convert them, or take another revision."
    if first(errors.LocalEntryNotFoundError) or first(errors.OfflineModeIsEnabled):
        return f"{repo} must be in the cache or reachable, got no answer from the Hub; check the network connection, HF_ENDPOINT and HF_HUB_OFFLINE."
    if "load image processor" in text:
        return f"{repo} must hold an image processor, got no readable preprocessor_config.json; save one beside the weights, or take another checkpoint."
    missing = first(errors.EntryNotFoundError)
    if missing is not None:
        return f"{repo} must be a checkpoint, got a repository without one of its files ({str(missing).splitlines()[-1]}); choose a repository that has it."
    return None


def download(repo: str, name: str, **hub) -> Path:
    """Downloads one file of a repository and returns its path."""
    from huggingface_hub import hf_hub_download

    with told_plainly(repo, hub.get("revision")):
        return Path(hf_hub_download(repo, name, **hub))


def download_all(repo: str, patterns: list[str], **hub) -> Path:
    """Downloads the files of a repository that match the patterns and returns their folder."""
    from huggingface_hub import snapshot_download

    with told_plainly(repo, hub.get("revision")):
        return Path(snapshot_download(repo, allow_patterns=patterns, **hub))
