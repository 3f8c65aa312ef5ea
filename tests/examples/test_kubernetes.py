"""The manifest: by Kubernetes' own schemas, and by what the server that it starts has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from fastapi.routing import APIRoute

from slipstream.server.commands.serve import serve
from slipstream.server.core.http.status import router

yaml = pytest.importorskip("yaml")
MANIFEST = Path(__file__).parents[2] / "examples" / "kubernetes" / "slipstream.yaml"
DOCUMENTS: list[dict[str, Any]] = list(yaml.safe_load_all(MANIFEST.read_text()))
DEPLOYMENT, SERVICE, BUDGET = DOCUMENTS
POD = DEPLOYMENT["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


@pytest.mark.parametrize("version", ["1.31", "1.37"])  # the first whose preStop can sleep unasked
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document["kind"]))
def test_every_field_is_kubernetes(document: dict[str, Any], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(document, version, strict=True)


def test_a_field_that_is_none_is_found() -> None:
    validator = pytest.importorskip("kubernetes_validate")
    with pytest.raises(validator.ValidationError):
        validator.validate({**SERVICE, "spec": {"ports": [{"port": "http"}]}}, "1.37", strict=True)
    with pytest.raises(validator.ValidationError):
        validator.validate({**SERVICE, "probe": {}}, "1.37", strict=True)


def arguments() -> dict[str, Any]:
    """The command line of the container as the server reads it."""
    words: list[str] = CONTAINER["command"] + CONTAINER["args"]
    program, command, *rest = words
    assert (program, command) == ("slipstream", "serve")
    with serve.make_context("serve", rest, token_normalize_func=None) as context:
        return dict(context.params)


def test_every_flag_is_the_servers() -> None:
    given = arguments()
    assert given["model"] == CONTAINER["volumeMounts"][0]["mountPath"]
    assert {"name": "http", "containerPort": given["port"]} in CONTAINER["ports"]
    assert given["host"] == "0.0.0.0"
    (variable,) = CONTAINER["env"]
    assert variable["name"] in {
        option.envvar for option in serve.params if isinstance(option, click.Option)
    }


def test_every_path_is_the_servers() -> None:
    paths = {route.path for route in router.routes if isinstance(route, APIRoute)}
    asked = [CONTAINER[probe]["httpGet"] for probe in PROBES]
    assert {each["path"] for each in asked} <= paths
    assert {each["port"] for each in asked} == {SERVICE["spec"]["ports"][0]["targetPort"]}
    annotations = POD["metadata"]["annotations"]
    assert annotations["prometheus.io/path"] in paths
    assert int(annotations["prometheus.io/port"]) == arguments()["port"]


def test_a_pod_has_the_time_to_drain() -> None:
    sleep = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    readiness = CONTAINER["readinessProbe"]
    assert sleep >= readiness["periodSeconds"] * readiness["failureThreshold"]
    grace = POD["spec"]["terminationGracePeriodSeconds"]
    assert grace >= sleep + arguments()["drain_timeout"] + 10


def test_memory_holds_what_the_server_may_take() -> None:
    given, limit = arguments(), CONTAINER["resources"]["limits"]["memory"]
    assert limit.endswith("Gi")
    pages = given["kv_cache_bytes"] + given["kv_offload_gib"] * (1 << 30)
    assert pages < int(limit.removesuffix("Gi")) << 30


def test_labels_select_the_pods() -> None:
    labels = POD["metadata"]["labels"]
    for selector in (
        DEPLOYMENT["spec"]["selector"]["matchLabels"],
        SERVICE["spec"]["selector"],
        BUDGET["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels.items()
    assert BUDGET["spec"]["minAvailable"] < DEPLOYMENT["spec"]["replicas"]
