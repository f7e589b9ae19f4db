"""The sensor that builds what is stale: what it asks for, and that it is off until somebody switches it on."""

from pathlib import Path

import dagster as dg
import pytest
import yaml
from toy_project import copied, replace_reference, run

from pipelines.automation import signature
from pipelines.compose import write_params
from pipelines.definitions import build_definitions
from pipelines.local import Folders

REQUESTS = """
from pathlib import Path
from pipelines.automation import run_requests
for request in run_requests(Path(".").resolve()):
    print(request.job_name, request.partition_key, *(key.to_user_string() for key in request.asset_selection), request.run_key)
"""
BUILD = "from pathlib import Path; from pipelines.build import materialize; materialize(Path('.'), mode='inline', target='amber')"


def test_lane_after_lane(built_toy: Path, tmp_path: Path) -> None:
    root = copied(built_toy, tmp_path)
    assert run(root, "-c", REQUESTS).split() == []
    replace_reference(root, "amber")
    first = run(root, "-c", REQUESTS).split()
    chain = ["reference_set", "aligned_checkpoint", "synthetic_images", "paired_images", "filtered_pairs", "privacy_audit", "baseline_segmenters",
             "aligned_segmenters", "filtered_segmenters", "metrics"]
    assert first[:-1] == ["build_target", "amber", *chain]
    assert run(root, "-c", REQUESTS).split() == first, "the same state is not tried twice: Dagster skips a key that it has seen"
    run(root, "-c", BUILD)
    assert run(root, "-c", REQUESTS).split()[:-1] == ["build_results", "None", "comparison", "report"]
    (root / "data/references/amber/images/0.png").write_text("yet another picture")
    run(root, "-c", BUILD)
    replace_reference(root, "amber")
    assert run(root, "-c", REQUESTS).split()[-1] != first[-1], "a state that comes back is built again"
    run(root, "-c", BUILD)
    replace_reference(root, "dim")
    assert {line.split()[1] for line in run(root, "-c", REQUESTS).splitlines()} == {"dim"}, "the results wait for every target"


def test_it_is_off(smoke_root: Path) -> None:
    definitions = build_definitions(smoke_root)
    states = {sensor.name: sensor.default_status for sensor in definitions.sensors}
    assert states["build_stale"] == dg.DefaultSensorStatus.STOPPED


@pytest.mark.parametrize("name", ["amber.safetensors", "data/source/standard/images/gone.png"])
def test_what_touches_an_input(smoke_root: Path, name: str) -> None:
    """A file of moments is an input of its own, and a link that leads nowhere is one more entry of its folder."""
    moments, data = smoke_root / "amber.safetensors", smoke_root / "data"
    moments.write_text("moments")
    layout = Folders(data / "source/standard", {"amber": data / "target/amber"}, str(moments)).layout()
    (smoke_root / "params.yaml").unlink()
    write_params(smoke_root / "params.yaml", ["task=refuge", "profile=smoke"], layout)
    before = signature(smoke_root)
    (smoke_root / name).unlink(missing_ok=True)
    missing = signature(smoke_root)
    assert (missing != before) is (name == moments.name)
    (smoke_root / name).symlink_to("nowhere")
    assert signature(smoke_root) not in (before, missing)


@pytest.mark.parametrize("sensor", ["changed_inputs", "build_stale"])
def test_a_file_that_cannot_be_read_is_not_named(smoke_root: Path, sensor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(smoke_root / "Mueller_Hans.png"))

    monkeypatch.setattr("pipelines.automation.signature", refuse)
    definitions = build_definitions(smoke_root)
    with dg.DagsterInstance.ephemeral() as instance:
        tick = definitions.resolve_sensor_def(sensor).evaluate_tick(dg.build_sensor_context(instance, definitions=definitions))
    assert tick.skip_message == "an input cannot be read (Permission denied); 'alignflow plan' names it"


def test_a_target_added_later_waits_and_the_others_do_not(smoke_root: Path) -> None:
    definitions = build_definitions(smoke_root)
    params = yaml.safe_load((smoke_root / "params.yaml").read_text())
    params["domains"]["later"], params["targets"]["later"] = {"dir": "data/target/amber"}, params["targets"]["amber"] | {"domain": "later"}
    (smoke_root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))

    def look(definitions: dg.Definitions, cursor: str | None) -> tuple[set[str], str | None, str | None]:
        with dg.DagsterInstance.ephemeral() as instance:
            context = dg.build_sensor_context(instance, cursor, definitions=definitions)
            tick = definitions.resolve_sensor_def("build_stale").evaluate_tick(context)
        return {str(request.partition_key) for request in tick.run_requests or ()}, tick.skip_message, tick.cursor

    asked, _, cursor = look(definitions, None)
    assert asked == {"standard", "amber", "violet"}
    asked, said, _ = look(definitions, cursor)
    assert not asked and "press Reload for what params.yaml has of late: domain later, target later" in str(said)
    asked, _, _ = look(build_definitions(smoke_root), cursor)
    assert asked == {"standard", "amber", "violet", "later"}
