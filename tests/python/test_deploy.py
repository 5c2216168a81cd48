"""The files that deploy the server: they parse, and name what exists."""

import json
import re
import shlex
import subprocess
import sys

import pytest
import yaml
from packaging.requirements import Requirement

from helpers import HERE
from test_serving_docs import families, flags

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = HERE.parent.parent
DOCKERFILE = (ROOT / "Dockerfile").read_text()
BOARD = json.loads((ROOT / "docs" / "grafana" / "star_attention.json").read_text())
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
KUBERNETES = list(yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text()))
# Of an engine that runs; the stand-in's is not asked for them before it is.
ENGINE_METRICS = {"kv_cache_usage_perc", "cached_blocks", "cached_bytes"}


def named_flags(words):
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def served_flags(script):
    """Flags of `star-attn serve` in a shell script."""
    (command,) = re.findall(r"star-attn serve (.*)", script.replace("\\\n", " "))
    return named_flags(shlex.split(command.rstrip("& ")))


def pods():
    (group,) = [each for each in KUBERNETES if each["kind"] == "LeaderWorkerSet"]
    template = group["spec"]["leaderWorkerTemplate"]
    return template["leaderTemplate"]["spec"], template["workerTemplate"]["spec"]


@pytest.mark.parametrize("name", ["deploy/slurm_serve.sh", "scripts/slurm_multinode.sh"])
def test_scripts_are_bash(name):
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_scripts_in_kubernetes_are_bash():
    scripts = [spec["containers"][0]["args"][0] for spec in pods()]
    scripts.append(KUBERNETES[0]["data"]["setup.sh"])
    for script in scripts:
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_flags_exist():
    named = named_flags(COMPOSE["services"]["server"]["command"])
    named |= served_flags((ROOT / "deploy" / "slurm_serve.sh").read_text())
    named |= served_flags(pods()[0]["containers"][0]["args"][0])
    assert named <= set(flags())
    assert "--engine_dir" in named


def test_yaml_of_prometheus_and_grafana():
    prometheus = yaml.safe_load((ROOT / "deploy" / "prometheus.yaml").read_text())
    (scraped,) = prometheus["scrape_configs"]
    port = COMPOSE["services"]["server"]["ports"][0].rpartition(":")[2]
    assert scraped["static_configs"] == [{"targets": [f"server:{port}"]}]
    for name in ("dashboards", "datasources"):
        assert yaml.safe_load((ROOT / "deploy" / "grafana" / f"{name}.yaml").read_text())


def test_compose_mounts_what_is_there():
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (ROOT / "deploy" / source).exists(), volume


def test_time_to_stop_is_enough():
    command = COMPOSE["services"]["server"]["command"]
    (wait,) = [int(each.rpartition("=")[2]) for each in command if "--shutdown-timeout" in each]
    assert int(COMPOSE["services"]["server"]["stop_grace_period"].rstrip("s")) > wait
    leader, worker = pods()
    (wait,) = re.findall(r"--shutdown-timeout=(\d+)", leader["containers"][0]["args"][0])
    for spec in leader, worker:
        assert spec["terminationGracePeriodSeconds"] > int(wait)


def test_probes_ask_for_what_is_served():
    leader, _ = pods()
    container = leader["containers"][0]
    assert container["startupProbe"]["httpGet"]["path"] == "/health"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    # A front whose ranks are started again lives.
    assert container["livenessProbe"]["httpGet"]["path"] == "/version"


def test_mounts_have_volumes():
    for spec in pods():
        volumes = {volume["name"] for volume in spec["volumes"]}
        mounts = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounts == volumes


def test_board_names_metrics_that_exist():
    known = set()
    for family in families():
        known |= {sample.name for sample in family.samples}
        known.add(family.name + ("_total" if family.type == "counter" else ""))
        if family.type == "histogram":
            known |= {family.name + end for end in ("_bucket", "_count", "_sum")}
    known |= {"star_attention:" + name for name in ENGINE_METRICS}
    shown = set()
    for panel in BOARD["panels"]:
        for target in panel["targets"]:
            names = re.findall(r"star_attention:\w+", target["expr"])
            assert names, target
            shown.update(names)
    assert shown <= known
    shown = {re.sub("_bucket$", "", name) for name in shown}
    families_known = {re.sub("_(bucket|count|sum|created)$", "", name) for name in known}
    families_known = {name for name in families_known if name + "_total" not in known}
    assert families_known <= shown, "the board shows every metric"


def test_panels_do_not_overlap():
    taken = set()
    for panel in BOARD["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells


def test_image_has_what_serving_needs():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    stage = DOCKERFILE.partition(" AS serve\n")[2].partition("\nFROM ")[0]
    pins = dict(re.findall(r"^ +([a-z0-9-]+)==([0-9.]+)", stage, re.MULTILINE))
    extras = project["optional-dependencies"]
    wanted = [*project["dependencies"], *extras["serve"], *extras["mpi"], *extras["trt"]]
    needs = {each.name: each for each in map(Requirement, wanted)}
    for name, version in pins.items():
        if name in needs:
            assert needs[name].specifier.contains(version), name
    # Engines need neither torch nor what reads checkpoints and writes graphs.
    assert needs.keys() - pins.keys() == {"gguf", "onnx", "safetensors", "torch"}


def test_image_serves():
    stage = DOCKERFILE.partition(" AS serve\n")[2].partition("\nFROM ")[0].replace("\\\n", " ")
    assert "\nUSER 10001\n" in stage
    assert "\nEXPOSE 8000\n" in stage
    (entry,) = re.findall(r"^ENTRYPOINT (.*)", stage, re.MULTILINE)
    assert json.loads(entry) == ["tini", "--", "star-attn", "serve"]
    (check,) = re.findall(r"^HEALTHCHECK .*?CMD (.*)", stage, re.MULTILINE)
    compile(json.loads(check)[2], "HEALTHCHECK", "exec")
