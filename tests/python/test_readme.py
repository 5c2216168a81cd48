"""What the README shows can be run."""

import re
import subprocess
import sys

from helpers import HERE, MODELS, WINDOWED_MODELS
from star_attention.models.config import ARCHITECTURES
from star_attention.models.gguf_config import ARCHITECTURES as GGUF_ARCHITECTURES
from star_attention.models.rope import SCALINGS
from test_llm import TEXT

README = (HERE.parent.parent / "README.md").read_text()


def test_python_example(tmp_path):
    _, code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (tmp_path / "report.txt").write_text(TEXT)
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout) > 20


def test_pictures_and_pages_exist():
    for target in re.findall(r"\]\((?!https?:|#)([^)]+)\)", README):
        path, _, section = target.partition("#")
        assert (HERE.parent.parent / path).exists(), target
        if section:
            titles = re.findall(r"^#+ (.*)$", (HERE.parent.parent / path).read_text(), re.MULTILINE)
            assert section in (title.lower().replace(" ", "-") for title in titles), target


def test_models_are_those_of_the_table():
    """Each is in the documentation, and there is a tiny one that tests run."""
    text = (HERE.parent.parent / "docs/models.md").read_text()
    rows = re.findall(r"^\| `(\w+ForCausalLM)` \| .* \| (.*) \| .* \|$", text, re.MULTILINE)
    assert [name for name, _ in rows] == list(ARCHITECTURES)
    assert {name for _, cell in rows for name in re.findall(r"`(\w+)`", cell)} == set(
        GGUF_ARCHITECTURES
    )
    models = *MODELS.values(), *WINDOWED_MODELS.values()
    tested = {"".join(map(str.capitalize, name.split("_"))) for name, _ in models}
    assert {f"{name}ForCausalLM" for name in tested} == set(ARCHITECTURES)
    rotary = text[text.index("| `rope_type` |") : text.index("- **longrope.**")]
    named = re.findall(
        r"`([a-z0-9]+)`", " ".join(re.findall(r"^\| (.*?) \|", rotary, re.MULTILINE))
    )
    assert {*named} - {"su"} == set(SCALINGS)
