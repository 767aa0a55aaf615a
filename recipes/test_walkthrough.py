"""docs/walkthrough.ipynb: its code runs from top to bottom, and what is stored in it is what comes out.

    pytest recipes/test_walkthrough.py

No notebook server: the code cells are executed in order in one namespace. By its tag a cell's text must come
out the same to the last digits (no tag), the same but for what trained models do on another machine (close),
or it only has to run, as it shows rollouts (free). The laptop's two models are made first if runs/ has none.
"""
import base64
import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent.parent / "docs"
NOTEBOOK = (DOCS / "walkthrough.ipynb").read_text(encoding="utf-8")
CELLS = json.loads(NOTEBOOK)["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
WORDS = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def stored(cell):
    """(text, number of pictures) that the notebook shows below a cell."""
    text = "".join("".join(output["text"]) for output in cell["outputs"] if output["output_type"] == "stream")
    return text, sum("image/png" in output.get("data", ()) for output in cell["outputs"])


@pytest.fixture(scope="module")
def fresh():
    """The same of an execution now, from docs/. The cells' own assertions hold, or this raises."""
    results, namespace, threads = [], {}, torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch, matplotlib.rc_context():
        patch.chdir(DOCS)
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(plt, "show", lambda: None)
        for number, cell in enumerate(CODE, 1):
            with contextlib.redirect_stdout(io.StringIO()) as text:
                exec(compile("".join(cell["source"]), f"walkthrough.ipynb [{number}]", "exec"), namespace)
            results.append((text.getvalue(), len(plt.get_fignums())))
            plt.close("all")
    torch.set_num_threads(threads)
    return results


def test_the_stored_outputs_are_those_of_the_code(fresh):
    """Catches a notebook that was not executed again after a change, and a method that no longer learns."""
    for number, (cell, (text, pictures)) in enumerate(zip(CODE, fresh), 1):
        shown, shown_pictures = stored(cell)
        assert pictures == shown_pictures and bool(text) == bool(shown), f"cell {number}"
        tags = cell["metadata"].get("tags", [])
        if "free" in tags:
            continue
        for line, shown_line in zip(text.splitlines(), shown.splitlines(), strict=True):
            assert NUMBER.sub("#", line).split() == NUMBER.sub("#", shown_line).split(), f"cell {number}"
            if "close" not in tags or line.startswith(("learner", "explorer", "S2L-PO")):  # GRPO is luck
                near = pytest.approx(list(map(float, NUMBER.findall(shown_line))), rel=0,
                                     abs=0.25 if "close" in tags else 0.002)
                assert list(map(float, NUMBER.findall(line))) == near, f"cell {number}: {line}"


def test_the_notebook_is_whole():
    """All cells ran, in order and without an error; pictures are there; a page that GitHub shows at once."""
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    images = [base64.b64decode(output["data"]["image/png"]) for output in outputs if "data" in output]
    assert len(images) == 7 and all(image.startswith(b"\x89PNG") for image in images)
    assert len(NOTEBOOK.encode()) < 600_000
    printed = "".join(stored(cell)[0] for cell in CODE)
    assert not re.search(r"(?<![\w.])/(home|root|tmp|mnt|Users|private)/", printed), "a path of some machine"
    assert all(len(line.rstrip("\n")) <= 110 for cell in CODE for line in cell["source"])
    exercises = len(re.findall(r"^\*\*\d\.\*\*", WORDS, re.M))
    assert WORDS.count("<details>") == WORDS.count("</details>") == exercises == 9
    for link in re.findall(r"\]\((?!http)([^)]+)\)", WORDS):
        assert (DOCS / link).exists(), link


@pytest.mark.parametrize("directory", [DOCS, DOCS.parent], ids=["docs", "root"])
def test_it_finds_the_modules_from(directory):
    command = [sys.executable, "-I", "-c", "".join(CODE[0]["source"])]
    subprocess.run(command, cwd=directory, check=True, env={"MPLBACKEND": "Agg", "PATH": ""})
