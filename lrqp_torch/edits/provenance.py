"""Where an edit comes from: the model, the site and the data that it was fitted on.

An edit is a probe of one model at one site. Put into another model of the same width it would run
without complaint and mean nothing, so a saved edit carries this record, and checks it.
"""

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Self

from torch import nn

from lrqp_torch.errors import ProvenanceError, RevisionWarning, SiteError, warn
from lrqp_torch.stream.sites import Site, locate
from lrqp_torch.stream.weights import PRECISIONS, fingerprint

REQUIRED = {"site": str, "model_type": str, "width": int, "layers": int}
OPTIONAL = {
    "model": str,
    "revision": str,
    "position": str,
    "task": str,
    "variable": str,
    "classes": list | tuple,
    "probe_accuracy": int | float,
    "probe_samples": int,
    "seed": int,
    "bos": bool,
    "weights": dict,
    "versions": dict,
}
VERSIONED_PACKAGES = ("torch", "transformers", "cvxpy", "cvxpylayers", "numpy", "safetensors")


def package_versions() -> dict[str, str]:
    """Versions of Python and of every package that the figures depend on."""
    from lrqp_torch import __version__

    versions = {"lrqp_torch": __version__, "python": platform.python_version()}
    for package in VERSIONED_PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@dataclass(frozen=True)
class Provenance:
    """What an edit was fitted on. Every field but the first four may be unknown, None.

    Attributes:
        site: such as ``"L6.mid"``.
        model_type: family of the model, its ``config.model_type``.
        width: of the model's residual stream.
        layers: number of the model's blocks.
        model: its name or path, as loaded.
        revision: commit of the Hub that its weights came from.
        position: name of the token position, such as ``"S2"``.
        task: what the prompts ask.
        variable: what the probe reads.
        classes: names of the probe's classes, in order.
        probe_accuracy: on prompts that the probe was not fitted on.
        probe_samples: how many prompts the probe was fitted on.
        seed: of the prompts and everything random.
        bos: whether the token that begins a text stood in front of the prompts; None for what the
            tokenizer does by itself.
        weights: a fingerprint of those that the stream is computed with there, by the precision
            that it holds in; see :func:`~lrqp_torch.stream.weights.fingerprint`.
        versions: of the packages that made it.
    """

    site: str
    model_type: str
    width: int
    layers: int
    model: str | None = None
    revision: str | None = None
    position: str | None = None
    task: str | None = None
    variable: str | None = None
    classes: tuple[str, ...] | None = None
    probe_accuracy: float | None = None
    probe_samples: int | None = None
    seed: int | None = None
    bos: bool | None = None
    weights: dict[str, str] | None = None
    versions: dict[str, str] | None = None

    @classmethod
    def of(cls, model: nn.Module, site: str, /, **known: Any) -> Self:
        """The record for an edit of ``model`` at ``site``; ``known`` are further fields.

        Raises:
            SiteError, UnknownFamilyError: no such site in this model.
            ProvenanceError: a field that does not exist, or of a wrong type.
        """
        facts = cls._here(model, site) | {"versions": package_versions()}
        return cls.from_json(facts | known)

    @staticmethod
    def _here(model: nn.Module, site: str | Site, weights: bool = True) -> dict[str, Any]:
        """What is asked of a model and a site each time that the edit is used there."""
        located = locate(model, site)
        return Provenance._model(model) | {
            "site": str(located.site),
            "weights": fingerprint(model, located) if weights else None,
        }

    @staticmethod
    def _model(model: nn.Module) -> dict[str, Any]:
        """What is asked of a model whatever the site."""
        config: Any = getattr(model, "config", None)
        if getattr(config, "model_type", None) is None:
            raise ProvenanceError(
                f"{type(model).__name__} has no config.model_type: provenance is of transformers "
                f"models, and an edit of another module has none"
            )
        text = config.get_text_config()
        return {
            "model_type": config.model_type,
            "width": int(text.hidden_size),
            "layers": int(text.num_hidden_layers),
            "model": getattr(config, "_name_or_path", None) or None,
            "revision": getattr(config, "_commit_hash", None),
        }

    @classmethod
    def from_json(cls, raw: Any) -> Self:
        """Read back what :meth:`to_json` made, or plain values in the same form.

        Raises:
            ProvenanceError: fields that are missing, unknown or of a wrong type.
        """
        if not isinstance(raw, dict):
            raise ProvenanceError(f"the provenance is {type(raw).__name__}, not a record of fields")
        kinds = REQUIRED | OPTIONAL
        wrong = [name for name in REQUIRED if raw.get(name) is None]
        wrong += [
            name
            for name, value in raw.items()
            if name not in kinds or not (value is None or isinstance(value, kinds[name]))
        ]
        if wrong:
            raise ProvenanceError(
                f"wrong, unknown or missing in the provenance: {', '.join(wrong)}; its fields are "
                f"{', '.join(kinds)}"
            )
        classes = raw.get("classes")
        return cls(**raw | {"classes": None if classes is None else tuple(map(str, classes))})

    def to_json(self) -> dict[str, Any]:
        """The known fields as plain JSON values."""
        known = {name: value for name, value in asdict(self).items() if value is not None}
        if self.classes is not None:
            known["classes"] = list(self.classes)
        return known

    def check(self, model: nn.Module, site: str | Site) -> None:
        """Refuse a model that the edit cannot be meant for, and warn of one that it may not be.

        Raises:
            ProvenanceError: another family, width or number of blocks.

        Warns:
            RevisionWarning: another name, revision or site, or other weights.
        """
        try:
            here = self._here(model, site, self.weights is not None)
        except SiteError:  # another model may well have no such site
            self._require_same_model(Provenance(site=str(site), **self._model(model)))
            raise
        self.compare(Provenance(**here))

    def compare(self, here: "Provenance") -> None:
        """:meth:`check` against the record that a model would be given here."""
        self._require_same_model(here)
        for name, what in (("model", "model"), ("revision", "revision"), ("site", "site")):
            made, found = getattr(self, name), getattr(here, name)
            if made is not None and found is not None and made != found:
                warn(
                    RevisionWarning,
                    f"this edit was fitted for {what} {made!r} and is used for {found!r}",
                )
        if self.site == here.site and not _agree(self.weights or {}, here.weights or {}):
            warn(
                RevisionWarning,
                f"the weights in front of {here.site} are not those that this edit was fitted on "
                f"(trained, merged or loaded since): what it promises are its probe's odds, which "
                f"may not mean there what they meant. Fit it anew; or, if you know better, set "
                f"edit.provenance = None",
            )

    def _require_same_model(self, here: "Provenance") -> None:
        for name, what in (("model_type", "family"), ("width", "width"), ("layers", "blocks")):
            made, found = getattr(self, name), getattr(here, name)
            if made != found:
                raise ProvenanceError(
                    f"this edit was fitted on {self.model or 'a model'} ({what} {made}), not on "
                    f"{here.model or 'this model'} ({what} {found}): it would mean nothing there. "
                    f"Fit one on this model; or, if you know better, set edit.provenance = None"
                )


def _agree(made: dict[str, str], here: dict[str, str]) -> bool:
    """Whether two fingerprints are equal in the finest precision that both are known in, if any."""
    both = [name for name in PRECISIONS if name in made and name in here]
    return not both or made[both[0]] == here[both[0]]
