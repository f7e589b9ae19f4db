"""One graph: the registry, dvc.yaml and the Dagster assets agree for every domain and target."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml
from toy_project import REPOSITORY

from alignflow_core.config import Project, build_project
from alignflow_core.runner import stage_config
from alignflow_core.stages import PACKAGE_DIR, STAGES, artifact_dir, node_id, source_files
from pipelines import assets, build, dvcfile
from pipelines.cli import main
from pipelines.definitions import build_definitions

# a source, two domains, three targets: two of one domain, one with references drawn from the domain
RAW = {
    "source": "standard",
    "domains": {name: {"dir": f"data/{name}"} for name in ("standard", "amber", "dim")},
    "targets": {
        "amber": {"domain": "amber", "references": {"dir": "data/references/amber"}},
        "amber-skl": {"domain": "amber", "variant_of": "amber", "references": {"dir": "data/references/amber"}, "align": {"reward": "skl"}},
        "dim-k4": {"domain": "dim", "references": {"count": 4}},
    },
}


@pytest.fixture(scope="module")
def project() -> Project:
    return build_project(RAW)


@pytest.fixture(scope="module")
def definitions(project: Project, tmp_path_factory: pytest.TempPathFactory) -> dg.Definitions:
    root = tmp_path_factory.mktemp("dagster")
    (root / "params.yaml").write_text(yaml.safe_dump(RAW))
    return build_definitions(root)


def registry_edges(project: Project) -> set[tuple[str, str]]:
    """(upstream node, node)."""
    return {(node_id(*upstream), node_id(stage.name, key)) for stage, key in project.graph.nodes()
            for upstream in project.graph.inputs(stage, key).values()}


@pytest.fixture(scope="module")
def dvc_stages(project: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, set[str]]]:
    """Node -> what DVC itself resolves for it: deps, outs, params."""
    from dvc.repo import Repo

    root = tmp_path_factory.mktemp("dvc")
    (root / "params.yaml").write_text(yaml.safe_dump({"seed": 0}))
    (root / "dvc.yaml").write_text(dvcfile.render(project, PACKAGE_DIR.parent))
    with Repo.init(str(root), no_scm=True) as repo:
        found = {}
        for stage in repo.index.stages:
            params = {name for dep in stage.deps if hasattr(dep, "params") for name in dep.params}
            deps = {dep.def_path for dep in stage.deps if not hasattr(dep, "params")}
            found[stage.name] = {"deps": deps, "outs": {out.def_path for out in stage.outs}, "params": params, "cmd": {stage.cmd}}
    return found


def test_dvc_has_the_graph_of_the_registry(project: Project, dvc_stages: dict[str, dict[str, set[str]]]) -> None:
    owner = {artifact_dir(stage.name, key).as_posix(): node_id(stage.name, key) for stage, key in project.graph.nodes()}
    edges = {(owner[dep], node) for node, parts in dvc_stages.items() for dep in parts["deps"] if dep in owner}
    assert set(dvc_stages) == set(owner.values())
    assert edges == registry_edges(project)
    for folder, node in owner.items():
        assert dvc_stages[node]["outs"] == {folder, f"{folder}.json"}


def test_dagster_has_the_graph_of_the_registry(project: Project, definitions: dg.Definitions) -> None:
    graph = definitions.resolve_asset_graph()
    stage_of = {dg.AssetKey(stage.asset): stage for stage in STAGES.values()}
    edges, params = set(), {}
    for asset, stage in stage_of.items():
        for key in project.graph.keys(stage):
            for upstream in graph.get(asset).parent_keys:
                keys: list[str | None] = [None]
                if graph.get(upstream).is_partitioned:
                    keys = list(graph.get_parent_partition_keys_for_child(key, upstream, asset).partitions_subset.get_partition_keys())
                if upstream in stage_of:
                    edges |= {(node_id(stage_of[upstream].name, each), node_id(stage.name, key)) for each in keys}
                elif upstream.to_user_string() == "params":
                    params[node_id(stage.name, key)] = keys
                else:
                    assert keys == [key], "a raw folder belongs to its own key"
    assert edges == registry_edges(project)
    assert params == {node: [node] for node in params} and len(params) == len(list(project.graph.nodes()))


def test_a_stage_depends_on_its_own_target_only(dvc_stages: dict[str, dict[str, set[str]]]) -> None:
    assert dvc_stages["align@amber-skl"]["params"] == {"seed", "machine", "task", "image_flow", "targets.amber-skl.align", "sample.guidance_scale",
                                                       "targets.amber-skl.align.reward", "targets.amber-skl.align.encoder"}
    assert dvc_stages["align@amber-skl"]["cmd"] == {"python -m alignflow_core stage align --target amber-skl"}
    assert dvc_stages["data@dim"]["cmd"] == {"python -m alignflow_core stage data --domain dim"}
    assert {f"alignflow_core/{name}" for name in source_files("align")} <= dvc_stages["align@amber"]["deps"]


def test_what_a_choice_imports_is_code_of_the_stage_and_other_choices_are_not() -> None:
    """A base trained by one noise schedule does not serve comparators of another: both depend on the schedule's file."""
    comparator, base = set(source_files("comparator")), set(source_files("comparator_base"))
    assert {"painters/process.py", "painters/residual.py", "flow/coupling.py"} <= comparator
    assert not {"painters/diffusion.py", "painters/controlnet.py", "painters/siamese.py"} & comparator, "the file that is chosen comes on top"
    assert {"painters/diffusion.py", "painters/flow.py", "painters/denoise.py", "painters/concat.py", "flow/coupling.py"} <= base
    assert "painters/concat.py" in source_files("image_flow")


def test_an_experiment_over_all_targets_leaves_variants_alone(dvc_stages: dict[str, dict[str, set[str]]]) -> None:
    assert {"reward", "encoder"} <= dvc_stages["align@amber"]["params"]
    assert not {"reward", "encoder"} & dvc_stages["align@amber-skl"]["params"]


def test_code_that_only_a_key_chooses_is_in_the_version_of_the_asset(project: Project) -> None:
    amber = dataclasses.replace(project.targets["amber"], align=dataclasses.replace(project.targets["amber"].align, encoder="flow"))
    both = project, dataclasses.replace(project, targets=project.targets | {"amber": amber})
    versions = {name: {assets.code_version(each, STAGES[name]) for each in both} for name in ("align", "data")}
    assert len(versions["align"]) == 2 and len(versions["data"]) == 1


def test_how_long_stage_two_takes_is_in_its_fingerprint() -> None:
    assert "alignment_steps.py" in source_files("align")


def test_a_stage_sees_what_it_declares_and_no_more(project: Project) -> None:
    config = stage_config(project, STAGES["filter"], "amber")
    assert vars(config.segment) == {"network": project.segment.network, "training": project.segment.training}
    assert set(vars(stage_config(project, STAGES["evaluate"], "amber").evaluate)) == {"lpips_weights"}


def test_raw_folders(dvc_stages: dict[str, dict[str, set[str]]]) -> None:
    assert "data/amber" in dvc_stages["data@amber"]["deps"]
    assert "data/references/amber" in dvc_stages["references@amber-skl"]["deps"]
    assert "data/dim" in dvc_stages["references@dim-k4"]["deps"], "drawn references follow the folder they are drawn from"


def test_an_installed_package_is_pinned_by_its_code(project: Project, tmp_path: Path) -> None:
    stages = yaml.safe_load(dvcfile.render(project, tmp_path))["stages"]
    assert stages["image_flow"]["deps"] == ["artifacts/data/standard"]
    assert " # code " in stages["image_flow"]["cmd"]


def test_dvcfile_command(smoke_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = ["--root", str(smoke_root)]
    assert dvcfile.main(["--check", *root]) == 3
    assert dvcfile.main(root) == 0
    assert dvcfile.main(["--check", *root]) == 0
    assert not dvcfile.write(smoke_root)
    (smoke_root / "params.yaml").write_text("source: nowhere\n")
    assert dvcfile.main(root) == 2
    assert "params.yaml" in capsys.readouterr().err


def test_the_committed_dvc_yaml_is_current() -> None:
    assert dvcfile.is_current(REPOSITORY), "run: python -m pipelines.dvcfile"


def test_selections_by_text(definitions: dg.Definitions) -> None:
    """Fails with an antlr runtime that does not fit Dagster's parser, as hydra-core 1.3 pins it."""
    downstream = dg.AssetSelection.from_string('key:"metrics"+').resolve(definitions.resolve_asset_graph())
    assert {key.to_user_string() for key in downstream} == {"metrics", "comparison", "report"}
    assert build.selected_stages(definitions, "key:report") == {"report"}


def test_a_selection_that_a_target_has_no_part_in_is_told(smoke_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["materialize", "key:report", "--target", "amber", "--root", str(smoke_root)]) == 2
    assert "selection 'key:report': holds nothing that target 'amber' needs" in capsys.readouterr().err


def test_one_target_with_all_it_needs(project: Project) -> None:
    nodes = [node_id(stage.name, key) for stage, key in build.chosen(project, None, "dim-k4")]
    assert "align@dim-k4" in nodes and "data@standard" in nodes and "segment_source" in nodes
    assert not {"align@amber", "data@amber", "report"} & set(nodes)
    assert [node_id(s.name, k) for s, k in build.chosen(project, {"align", "report"}, "amber")] == ["align@amber"]


def test_dagster_loads_the_repository() -> None:
    """The console command, as a person or CI would run it."""
    done = subprocess.run([sys.executable, "-m", "dagster", "definitions", "validate", "-w", "workspace.yaml"], cwd=REPOSITORY,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
