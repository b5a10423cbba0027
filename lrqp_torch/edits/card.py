"""The model card of a saved edit: what it is, where it belongs, and how to load it."""

from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lrqp_torch.edits.provenance import Provenance

CARD_FILE = "README.md"

_USE = """```python
import lrqp_torch as lrqp

edit = lrqp.LRQP.from_pretrained("{name}")
with edit.at(model, "{site}", positions=positions, target=target) as run:
    logits = model(**inputs).logits
```"""


def model_card(name: str, facts: dict[str, Any], provenance: Provenance | None) -> str:
    """The text of ``README.md`` for one edit, with the metadata that the Hub reads.

    Args:
        name: a folder or a name on the Hub, for the example.
        facts: the edit's own figures, by label.
        provenance: where it comes from, if that is known.
    """
    origin = provenance.to_json() if provenance is not None else {}
    versions = origin.pop("versions", {})
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
    site = origin.get("site", "L6.mid")
    text = (
        f"---\n{metadata.to_yaml()}\n---\n\n"
        f"# An LRQP edit\n\n"
        f"The least change of a model's residual stream, in Mahalanobis distance, after which a "
        f"linear probe reads the class that is asked for.\n\n"
        f"| | |\n|---|---|\n{table}\n\n{_USE.format(name=name, site=site)}\n"
    )
    return str(ModelCard(text))


def _cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def _is_hub_name(name: str) -> bool:
    parts = name.split("/")
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "~")) and "\\" not in name
