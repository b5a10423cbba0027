"""Folders on the Hugging Face Hub, sent and fetched whole."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from lrqp_torch.errors import HubError

PATTERNS = ["*.safetensors", "*.json", "README.md"]
"""All that an edit or a library consists of; nothing else is sent or fetched."""

_UNREACHABLE = (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError)


def pushed(
    save: Callable[[Path], Path],
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    commit_message: str = "Add an LRQP edit",
) -> str:
    """Send a saved edit or library to a model repository, made if it does not exist.

    Args:
        save: writes the files into a given folder; called with one that is removed afterwards.
        repo_id: such as ``"user/name"``.
        token: of the Hub; default the one that ``hf auth login`` keeps.
        private: whether a repository that is made now is private.
        commit_message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        HubError: the Hub cannot be reached, or refuses.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        save(Path(folder))
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                allow_patterns=PATTERNS,
                commit_message=commit_message,
            )
        except _UNREACHABLE as error:
            raise HubError(
                f"nothing was sent to {repo_id!r}: {error}. Check the name, the network and "
                f"`hf auth whoami`"
            ) from error
    return str(commit.commit_url)


def fetched_folder(
    name_or_path: str | Path, *, revision: str | None = None, token: str | None = None
) -> Path:
    """A local folder as it is, or the Hub's of that name, from the cache where it is there.

    Raises:
        HubError: there is no such folder, and the Hub has none or cannot be reached.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        if revision is not None:
            raise HubError(f"{str(folder)!r} is a local folder, which has no revisions")
        return folder
    try:
        return Path(
            snapshot_download(
                str(name_or_path), revision=revision, token=token, allow_patterns=PATTERNS
            )
        )
    except _UNREACHABLE as error:
        raise HubError(
            f"{str(name_or_path)!r} is no local folder and cannot be fetched from the Hub: {error}"
        ) from error
