"""Edits on the Hugging Face Hub: their model card, and folders sent and fetched whole."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch

from lrqp_torch.edits.provenance import Provenance
from lrqp_torch.errors import HubError

CARD_FILE = "README.md"
PATTERNS = ["*.safetensors", "*.json", CARD_FILE]
"""All that an edit or a library consists of; nothing else is sent or fetched."""

_TEXT = """# An LRQP edit

The least change of a model's residual stream, in Mahalanobis distance, after which a linear probe \
reads the class that is asked for.

| | |
|---|---|
{table}

```python
import lrqp_torch as lrqp

edit = lrqp.LRQP.from_pretrained("{name}")
with edit.at(model, "{site}", positions=positions, target=target) as run:
    logits = model(**inputs).logits
```
"""


class Shared(ABC):
    """What can be saved to a folder and loaded from one, and so from the Hugging Face Hub."""

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write it to a folder."""

    @classmethod
    @abstractmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> Self:
        """Read what :meth:`save` wrote. Nothing is executed."""

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """Load from a folder, or from the Hugging Face Hub.

        Raises:
            HubError: no such folder, and the Hub has none or cannot be reached.
            SavedEditError: as :meth:`load`.
        """
        return cls.load(fetched_folder(name_or_path, revision=revision, token=token), device)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Send it to the Hub; ``options`` are those of :func:`~.hub.pushed`."""
        return pushed(self.save, repo_id, **options)


def model_card(name: str, facts: dict[str, Any], provenance: Provenance | None) -> str:
    """The text of ``README.md`` for one edit, with the metadata that the Hub reads.

    Args:
        name: a folder or a name on the Hub, for the example.
        facts: the edit's own figures, by label.
        provenance: where it comes from, if that is known.
    """
    from huggingface_hub import ModelCard, ModelCardData

    origin = provenance.to_json() if provenance is not None else {}
    versions, _ = origin.pop("versions", {}), origin.pop("weights", None)
    base = origin.get("model")
    metadata = ModelCardData(
        library_name="lrqp_torch",
        tags=["activation-steering", "interpretability", "lrqp"],
        # Only a name of the Hub may stand here, and a path of some disk is none.
        base_model=base if base is not None and _is_hub_name(base) else None,
    )
    rows = [(label.replace("_", " "), value) for label, value in (origin | facts).items()]
    rows += [("made with", ", ".join(f"{key} {value}" for key, value in versions.items()))]
    table = "\n".join(f"| {label} | {_cell(value)} |" for label, value in rows if value)
    text = _TEXT.format(table=table, name=name, site=origin.get("site", "L6.mid"))
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}"))


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _is_hub_name(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "~")) and "\\" not in name


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
    from huggingface_hub import HfApi

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
        except _unreachable() as error:
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
    folder, name = Path(name_or_path), str(name_or_path)
    if folder.is_dir():
        if revision is not None:
            raise HubError(f"{name!r} is a local folder, which has no revisions")
        return folder
    import huggingface_hub

    try:
        fetched = huggingface_hub.snapshot_download(
            name, revision=revision, token=token, allow_patterns=PATTERNS
        )
    except _unreachable() as error:
        why = " ".join(str(error).split())
        raise HubError(
            f"{name!r} is no local folder and cannot be fetched from the Hub: {why} Check the "
            "spelling, if a folder is meant"
        ) from error
    return Path(fetched)


def _unreachable() -> tuple[type[Exception], ...]:
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    return HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError
