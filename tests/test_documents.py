"""The code of the documents runs, what they name exists, and every notebook runs."""

import importlib
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("**/*.ipynb"))

every_document = pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "curvax/README.md"]
)


def blocks_of(document):
    """Return the python blocks, after as many empty lines as put them at their line numbers."""
    text = (ROOT / document).read_text()
    blocks = re.finditer(r"```python\n(.*?)```", text, re.DOTALL)
    return ["\n" * text.count("\n", 0, block.start(1)) + block.group(1) for block in blocks]


def run(document, after_block=lambda block, names: None):
    """Run the blocks of a document from top to bottom, and return the names that they leave."""
    names = {"__name__": document}
    for block in blocks_of(document):
        exec(compile(block, str(ROOT / document), "exec"), names)
        after_block(block, names)
    return names


def test_the_code_of_the_readme_runs_from_top_to_bottom():
    def call_it(block, names):
        if "def accumulated_step" in block:
            tx, params, key = names["tx"], names["params"], names["jax"].random.key(0)
            names["accumulated_step"](params, tx.init(params), names["micro"], key)

    assert len(blocks_of("README.md")) > 4
    assert run("README.md", call_it)["loss"] < 0.5


def test_the_skeletons_of_the_contributing_page_run():
    run("CONTRIBUTING.md")


def test_the_notation_of_the_house_is_what_the_code_computes():
    run("curvax/README.md")


@every_document
def test_links_lead_to_files(document):
    path = ROOT / document
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text())
    missing = [link for link in links if not (path.parent / link).exists()]
    assert not missing, f"{document} links to what is not there: {missing}"


@every_document
def test_names_of_the_library_exist(document):
    """`curvax.kron.merge`, `curvax/solve/_cg.py`: where a page says it, a reader finds it."""
    text = (ROOT / document).read_text()
    dotted = set(re.findall(r"`(curvax(?:\.\w+)+)", text))
    files = set(re.findall(r"`((?:curvax|tests|examples)/[\w/]+\.py)`", text))
    missing = [name for name in dotted if not is_importable(name)]
    missing += [name for name in files if not (ROOT / name).exists()]
    assert not missing, f"{document} names what is not there: {sorted(missing)}"


def is_importable(dotted):
    """Return whether a dotted name can be reached from `curvax`."""
    value = importlib.import_module("curvax")
    for name in dotted.split(".")[1:]:
        if not hasattr(value, name):
            return False
        value = getattr(value, name)
    return True


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
