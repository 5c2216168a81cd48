"""What docs/serving.md and the README say of the server is what the server says of itself."""

import re

import click
import pytest
from prometheus_client import CollectorRegistry

from fake_engine import FakeEngine
from fake_tokenizer import ByteTokenizer
from helpers import HERE
from star_attention.cli.serve import serve
from star_attention.serve.metrics import Metrics
from star_attention.serve.options import ServeOptions

ROOT = HERE.parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text()


def section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def rows(title):
    """The first and the second cell of each row of a section's tables."""
    return [line.split(" | ")[:2] for line in section(title).splitlines() if line[:3] == "| `"]


def flags():
    options = [each for each in serve.params if isinstance(each, click.Option)]
    return {option.opts[0]: option for option in options}


def test_every_flag_is_in_the_table():
    named = [name.strip("| `") for name, _ in rows("Flags")]
    assert sorted(named) == sorted(flags())


def test_defaults_are_in_the_table():
    for name, default in rows("Flags"):
        option = flags()[name.strip("| `")]
        if option.show_default:
            value = option.default
            told = value if isinstance(value, str) else f"{value:g}"
            assert default.strip("`") == told, name


@pytest.mark.parametrize("path", ["README.md", "docs/serving.md", "docs/tensorrt_llm.md"])
def test_commands_use_flags_that_exist(path):
    text = (ROOT / path).read_text().replace("\\\n", " ")
    for command in re.findall(r"star-attn serve (.*)", text):
        for flag in re.findall(r"(?<!\S)--[a-z_-]+", command.partition("#")[0].partition("`")[0]):
            assert flag in flags(), command


def families():
    registry = Metrics(FakeEngine(ByteTokenizer())).registry
    assert isinstance(registry, CollectorRegistry)
    return list(registry.collect())


def test_every_metric_is_in_the_table():
    table = "".join(name for name, _ in rows("Metrics"))
    named = {name.partition("{")[0] for name in re.findall(r"`([^`]+)`", table)}
    known = {
        family.name.removeprefix("star_attention:") + ("_total" if family.type == "counter" else "")
        for family in families()
    }
    assert known <= named
    # Of an engine that runs.
    assert named - known <= {"kv_cache_usage_perc", "cached_blocks", "cached_bytes"}


def test_python_example_is_python():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    compile(code, "serving.md", "exec")


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    titles = {title.lower().replace(" ", "-") for title in re.findall(r"\n## (.*)", PAGE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= titles


def test_bounds():
    options = ServeOptions(("tiny",))
    assert f"longer than {options.body_timeout:g} s to arrive" in PAGE
    assert f"unread for {options.client_timeout:g} s" in PAGE
