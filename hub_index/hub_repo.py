"""Adapters of the Hugging Face Hub: the adapter's files of one commit, through the cache of huggingface_hub.

Only files that an adapter is made of are asked for, so a whole model is never downloaded by mistake. What a branch
points to changes: the record keeps the commit, which is the name of the snapshot's folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from compose.errors import BackendUnavailableError, HubIndexError
from compose.files.safetensors_file import MAX_FILE_BYTES
from compose.formats.peft_folder import CONFIG_NAME, LEGACY_NAME, WEIGHTS_NAME

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,199}")
FILES = (
    CONFIG_NAME,
    WEIGHTS_NAME,
    "compeft_config.json",
    "adapter_model.compeft.safetensors",
    "README.md",
    ".eval_results/*.yaml",
    "merge.json",
    "report.json",
)


class RepoId(NamedTuple):
    """A repository and a revision of it; ``""``: its main branch."""

    repo_id: str
    revision: str


def parse_repo(text: str) -> RepoId | None:
    """Return ``owner/name`` or ``owner/name@revision``, also after ``hf:``; None for anything else."""
    name, _, revision = text.removeprefix("hf:").partition("@")
    fine = _REPO.fullmatch(name) and ".." not in name and "--" not in name and len(name) <= 193
    if not fine or (revision and (not _REVISION.fullmatch(revision) or ".." in revision)):
        return None
    return RepoId(name, revision)


def fetch(repo: RepoId, *, allow_pickle: bool = False, cache: Path | None = None) -> Path:
    """Return the snapshot's folder in the cache, downloading what is missing unless ``HF_HUB_OFFLINE`` is set.

    Args:
        repo: Which.
        allow_pickle: Also fetch ``adapter_model.bin``.
        cache: The cache's folder; huggingface_hub's own by default.

    Raises:
        HubIndexError: No such repository, revision or adapter in it; no access; a file that is too large; or offline
            and not in the cache.
        BackendUnavailableError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise BackendUnavailableError("repositories need huggingface_hub. Run: pip install huggingface_hub") from None
    patterns = _anywhere(*FILES, *([LEGACY_NAME] if allow_pickle else []))
    try:
        _look(repo, _anywhere(*FILES, LEGACY_NAME), cache, allow_pickle)
        place = snapshot_download(
            repo.repo_id, revision=repo.revision or None, cache_dir=cache, allow_patterns=patterns
        )
        return Path(place)
    except LocalEntryNotFoundError as error:
        raise HubIndexError(_offline(repo, error)) from None
    except (HfHubHTTPError, HFValidationError) as error:
        message = f"{_label(repo)}: {_first_line(error)}; check name and revision, or run: hf auth login"
        raise HubIndexError(message) from None


def _anywhere(*names: str) -> list[str]:
    """Return patterns for files of these names in the repository's folder or any below."""
    return [*names, *(f"*/{name}" for name in names)]


def _look(repo: RepoId, patterns: list[str], cache: Path | None, allow_pickle: bool) -> None:
    """Refuse, before anything is downloaded, a file that would not be read and weights that are only pickled.

    Offline the cache is taken as it is.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError
    from huggingface_hub.utils import tqdm

    class Silent(tqdm):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **{**options, "disable": True})

    if constants.HF_HUB_OFFLINE:
        return
    try:
        listed = snapshot_download(
            repo.repo_id,
            revision=repo.revision or None,
            cache_dir=cache,
            allow_patterns=patterns,
            tqdm_class=Silent,
            dry_run=True,
        )
    except DryRunError:  # not reachable: what the cache has will do
        return
    names = {one.filename for one in listed}
    pickled = sorted(name for name in names if name.rpartition("/")[2] == LEGACY_NAME)
    if pickled and not allow_pickle and not any(name.endswith(".safetensors") for name in names):
        raise HubIndexError(
            f"{_label(repo)}: the weights are pickled ({pickled[0]}), which can run code; nothing was downloaded. If "
            "you trust them, add it with --allow-pickle; they are then converted in a bounded process"
        )
    large = [one for one in listed if one.file_size is not None and one.file_size > MAX_FILE_BYTES]
    if large:
        raise HubIndexError(
            f"{_label(repo)}: {large[0].filename} has {large[0].file_size:,} bytes, more than the limit of "
            f"{MAX_FILE_BYTES:,}; nothing was downloaded"
        )


def _offline(repo: RepoId, error: Exception) -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return (
            f"{_label(repo)}: not in the cache of Hugging Face, and HF_HUB_OFFLINE is set. Where there is a network, "
            f"run: hf download {repo.repo_id}; or unset HF_HUB_OFFLINE"
        )
    return f"{_label(repo)}: {_first_line(error)}; check the network"


def _label(repo: RepoId) -> str:
    return f"{repo.repo_id}@{repo.revision}" if repo.revision else repo.repo_id


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
