"""Makes notebooks of pages of the folder above, runs them, and keeps what they print and draw.

    python docs/notebooks/make.py            # all of them
    python docs/notebooks/make.py own_task

Needs nbclient and ipykernel. A page's text becomes cells of text, its blocks of Python cells of
code. Of figures the picture is kept, which can be seen where no script runs.
"""

import re
import sys
from pathlib import Path
from typing import Any

PAGES = ("tutorial", "own_task")
HERE = Path(__file__).parent


def made_of(page: Path) -> Any:
    """The notebook of a page, without outputs."""
    import nbformat

    parts = re.split(r"```python\n(.*?)```\n", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    parts[::2] = [re.sub(r"\]\((?!https?:|#)([^)]+)\)", r"](../\1)", part) for part in parts[::2]]
    make = (nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell)
    cells = [make[index % 2](part.strip()) for index, part in enumerate(parts) if part.strip()]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # the same whenever it is made
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(notebook: Any, folder: Path) -> Any:
    """The notebook with the outputs of all its cells.

    Raises:
        CellExecutionError: a cell failed.
    """
    from nbclient import NotebookClient

    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.get("data", {}).pop("application/vnd.plotly.v1+json", None)
            if "image/png" in output.get("data", {}):
                output["data"].pop("text/html", None)
        kept = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
        if "outputs" in cell:
            cell["outputs"] = kept
    return notebook


def main(names: list[str]) -> None:
    """Write the notebooks of these pages."""
    import nbformat

    for name in names:
        notebook = run(made_of(HERE.parent / f"{name}.md"), HERE)
        path = HERE / f"{name}.ipynb"
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:] or list(PAGES))
