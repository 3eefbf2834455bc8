"""What deploy/ and the docs refer to is there: files, metrics, arguments of programs."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from ov_kvcrush.core.outputs import PipelineMetrics
from ov_kvcrush.server import main
from ov_kvcrush.server.metrics import Metrics
from ov_kvcrush.server.ray.settings import parse_settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
DASHBOARD = json.loads((DEPLOY / "grafana/ov_kvcrush.json").read_text())


def in_metrics() -> set[str]:
    """Names of all samples that the server's /metrics can have."""
    metrics = Metrics()
    nothing = PipelineMetrics(**{field.name: 0 for field in fields(PipelineMetrics)})
    metrics.watch(lambda: nothing, lambda: (0, 0, 0))
    names = set()
    for family in metrics.registry.collect():
        suffixes = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("_total",)}.get(family.type, ("",))
        names |= {family.name + suffix for suffix in suffixes}
    return names


def queries() -> list[str]:
    variables = [variable["query"]["query"] for variable in DASHBOARD["templating"]["list"]]
    return [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]] + variables


def test_the_dashboard_asks_for_what_the_server_tells() -> None:
    asked = {name for query in queries() for name in re.findall(r"\bov_kvcrush_\w+", query)}
    assert asked
    assert asked <= in_metrics()


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert all(x < 24 for x, _ in cells)
        assert not cells & taken
        taken |= cells
    sources = {target["datasource"]["uid"] for panel in DASHBOARD["panels"] for target in panel["targets"]}
    (known,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yaml").read_text())["datasources"]
    assert sources == {known["uid"]}


def test_compose_refers_to_what_is_there() -> None:
    services = COMPOSE["services"]
    build = services["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    for service in services.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
        assert all(published.startswith("127.0.0.1:") for published in service.get("ports", ()))
    targets = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())["scrape_configs"][0]["static_configs"][0]
    assert {target.split(":")[0] for target in targets["targets"]} <= services.keys()
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/ov_kvcrush.yaml").read_text())["providers"]
    mounts = [volume.split(":")[1] for volume in services["grafana"]["volumes"]]
    assert any(mount.startswith(provider["options"]["path"]) for mount in mounts)


def test_the_container_starts_a_program_with_options_it_has() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)[0])
    command = [word for word in entry + COMPOSE["services"]["server"]["command"] if word.startswith("--")]
    known = {option for parameter in typer.main.get_command(main.app).params for option in parameter.opts}
    assert set(command) <= known
    assert f'{entry[0]} = "ov_kvcrush.server.main:main"' in (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^USER (?!root)", text, re.MULTILINE)
    assert "/ready" in re.findall(r"^HEALTHCHECK .*\n.*$", text, re.MULTILINE)[0]


@pytest.mark.parametrize("name", ["ray.yaml", "kuberay.yaml"])
def test_ray_is_given_settings_it_knows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OV_KVCRUSH_API_KEYS", "one two")
    document: dict[str, Any] = next(yaml.safe_load_all((DEPLOY / name).read_text()))
    config = yaml.safe_load(document["spec"]["serveConfigV2"]) if "spec" in document else document
    (application,) = config["applications"]
    assert application["import_path"] == "ov_kvcrush.server.ray:app"
    settings, _ = parse_settings(application["args"])
    assert settings.max_replicas >= settings.min_replicas


@pytest.mark.parametrize("page", ["README.md", "CHANGELOG.md"])
def test_links_lead_to_files(page: str) -> None:
    """Those of docs/ are checked by `mkdocs build --strict`."""
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", (ROOT / page).read_text())
    missing = [x for x in targets if not x.startswith("http") and not (ROOT / x).exists()]
    assert not missing
