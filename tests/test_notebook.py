"""In a real notebook kernel, where an event loop is running, `map` works as it stands."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.slow

CELLS = [
    "import datasets; datasets.disable_progress_bars()\nfrom tessy_hf import demo",
    "prompts = demo.prompts(12, seed=6)\ntessy_transform = demo.transform(temperature=0, journal=None)",
    "rows = prompts.map(tessy_transform, batched=True, features=tessy_transform.features(prompts))\n"
    "print(sum(demo.verify(row) for row in rows), rows[0]['answer'])",
    "stream = prompts.to_iterable_dataset()\n"
    "streamed = list(stream.map(tessy_transform, batched=True, features=tessy_transform.features(stream)))\n"
    "print(streamed == list(rows)); tessy_transform.close()",
]


@pytest.mark.filterwarnings("ignore")  # of the notebook machinery's own
def test_map_in_a_notebook():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
    printed = [
        "".join(o.get("text", "") for o in cell.outputs if o.get("name") == "stdout") for cell in notebook.cells
    ]
    right, _, answer = printed[2].strip().partition(" ")
    assert int(right) >= 10 and answer.startswith("the answer is")
    assert printed[3].strip() == "True"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[1] / "examples").glob("*.ipynb")), ids=lambda path: path.stem
)
def test_the_examples_run_from_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells), "clear the outputs before committing"
    NotebookClient(notebook, timeout=240, kernel_name="python3").execute()
