"""``lrqp serve``: an OpenAI-compatible server with edits armed."""

import os
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from lrqp_torch.cli import options as given
from lrqp_torch.cli.app import Voice, command

if TYPE_CHECKING:
    from lrqp_torch.serving.requests import Library, NamedEdit

GROUP, PLUGIN, ALLOWED = "vllm.general_plugins", "lrqp", "VLLM_PLUGINS"
SERVER = "vllm.entrypoints.openai.api_server"


@command(panel=given.OWN)
def serve(
    voice: Voice,
    model: given.Model,
    edits: Annotated[
        list[str],
        typer.Option(
            help="Folder of an edit, of a library, or of several of these; may be given several "
            "times. Requests name edits by their folders."
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- OPTIONS]", help="Further options of vLLM's own server, behind --."
        ),
    ] = None,
) -> None:
    """Serve a model with vLLM, over OpenAI's protocol, with edits that each request may ask for.

    A request names edits in vllm_xargs; its answer holds a certificate of each edited token. Needs
    vLLM. docs/serving.md shows a request.
    """
    from lrqp_torch.models.load import pretrained_folder
    from lrqp_torch.serving.requests import FOLDERS_VARIABLE, Library

    each = (part for item in edits for part in item.split(os.pathsep))
    folders = os.pathsep.join(os.path.abspath(part) for part in each)
    library = Library.load(folders)
    environment = _armed() | {FOLDERS_VARIABLE: folders}
    source = pretrained_folder(model)
    names = (model, source)
    _check_model(library, source, names)
    voice.say(*(_described(item) for item in library.values()))
    voice.say(f"{model} at http://{host}:{port}/v1 with {len(library)} edits; it takes a minute.")
    arguments = [
        sys.executable, "-m", SERVER, "--model", source,
        "--served-model-name", model, "--host", host, "--port", str(port), *(options or ()),
    ]  # fmt: skip
    sys.stdout.flush()
    os.execve(sys.executable, arguments, environment)


def _armed() -> dict[str, str]:
    """The environment of a server that loads the plugin, or says why not.

    Raises:
        MissingExtraError: vLLM is not installed.
        ServingError: vLLM would not find the plugin.
    """
    from lrqp_torch.errors import MissingExtraError, ServingError

    if find_spec("vllm") is None:
        raise MissingExtraError(
            "vLLM is not installed: pip install 'lrqp_torch[vllm]'; without a GPU, the packages of "
            "constraints-serving.txt, which `make test-serving` installs"
        )
    if not any(entry.name == PLUGIN for entry in entry_points(group=GROUP)):
        raise ServingError(
            f"vLLM would not find the edits: lrqp_torch is on the path and not installed, so that "
            f"it has no entry point in {GROUP}; pip install --no-deps -e . (or lrqp_torch)"
        )
    environment = dict(os.environ)
    allowed = environment.get(ALLOWED)
    if allowed is not None and PLUGIN not in allowed.split(","):
        environment[ALLOWED] = f"{allowed},{PLUGIN}".strip(",")
    return environment


def _check_model(library: "Library", source: str, names: tuple[str, ...]) -> None:
    """Refuse edits of another model before the server takes a minute to do so."""
    from transformers import AutoConfig

    from lrqp_torch.errors import ModelError

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ModelError(f"no model {source!r}: {error}") from error
    library.check_model(config, names)


def _described(item: "NamedEdit") -> str:
    classes = ", ".join(f"{name} {part.n_classes}" for name, part in item.parts.items())
    return f"{item.name}: {item.site}, classes: {classes}, {item.digest}, from {item.folder}"
