"""What the README shows can be run."""

import re
import subprocess
import sys

from helpers import HERE
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
