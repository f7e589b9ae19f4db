"""Each rule of the configuration: a value that breaks it is refused in one line that names its key."""

import copy
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ruamel.yaml import YAML

from alignflow_core import config
from alignflow_core.config import build_project, load_project, wrong_name
from alignflow_core.errors import InputError
from alignflow_core.validation import at_least, between, one_of, positive

WHOLE: dict[str, Any] = {"source": "a", "domains": {"a": {"dir": "a"}, "b": {"dir": "b"}}, "targets": {"b": {"domain": "b"}},
                         "comparators": {"spade": {"process": "flow", "conditioner": "spade"}, "net": {}}}
TO_MOMENTS = {"targets.b.references.file": "b.safetensors", "targets.b.align.rounds": 1, "targets.b.align.recolour": False}
PRIVATE = {"targets.b.align.privacy.epsilon": 8.0, "targets.b.align.recolour": False}

# The rule's key, as the source has it -> the place of a value that breaks it, and the value.
RANGES: dict[str, tuple[str, Any]] = {
    "machine.device": ("machine.device", "tpu"), "machine.precision": ("machine.precision", "fp8"), "machine.threads": ("machine.threads", 0),
    "task.kind": ("task.kind", "rgb"), "number of task.classes": ("task.classes", []),
    "references.count": ("targets.b.references.count", 0), "references.held_out_fraction": ("targets.b.references.held_out_fraction", 0.95),
    "training.steps": ("image_flow.training.steps", 0), "training.batch": ("labeller.training.batch", 0),
    "training.lr": ("segment.training.lr", 0), "training.ema": ("mask_flow.training.ema", 1.5),
    "training.optimiser": ("image_flow.training.optimiser", "sgd"),
    "image_flow.coupling": ("image_flow.coupling", "ot"),
    "comparators: process": ("comparators.net.process", "gan"), "comparators: conditioner": ("comparators.net.conditioner", "film"),
    "comparators: objective": ("comparators.net.objective", "gan"), "comparators: n_steps": ("comparators.net.n_steps", 1),
    "comparator_base.share": ("comparator_base.share", 1.0),
    "segmenter network.norm": ("segment.network.norm", "layer"), "segmenter network.architecture": ("labeller.network.architecture", "vit"),
    "segmenter network.weights": ("segment.network.weights", {"unet": "folder"}),
    "align.reward": ("targets.b.align.reward", "loss"), "align.encoder": ("targets.b.align.encoder", "resnet"),
    "align.regions": ("targets.b.align.regions", "all"), "align.gradient": ("targets.b.align.gradient", "none"),
    "align.denoise": ("targets.b.align.denoise", "all"), "align.adapter": ("targets.b.align.adapter", "dora"),
    "align.region_share": ("targets.b.align.region_share", -0.1), "align.confidence": ("targets.b.align.confidence", 1.1),
    "align.rounds": ("targets.b.align.rounds", 0),
    "align.recolour_steps": ("targets.b.align.recolour_steps", -1), "align.lora_rank": ("targets.b.align.lora_rank", 0),
    "align.k": ("targets.b.align.k", 0), "align.training.batch": ("targets.b.align.training.batch", 1),
    "synthetic_share": ("targets.b.synthetic_share", 1.1),
    "data.size": ("data.size", 8),
    "sample.solver": ("sample.solver", "rk4"), "sample.mask_source": ("sample.mask_source", "drawn"), "sample.n_pairs": ("sample.n_pairs", 3),
    "sample.n_paired": ("sample.n_paired", 1), "sample.strengths": ("sample.strengths", [1.0, 2.0]),
    "number of sample.strengths": ("sample.strengths", []),
    "sample.starts": ("sample.starts", [0.0, 0.95]), "number of sample.starts": ("sample.starts", []),
    "number of segment.arms": ("segment.arms", []),
    "number of segment.architectures": ("segment.architectures", []), "segment.architectures": ("segment.architectures", ["vit"]),
    "segment.seeds": ("segment.seeds", 0), "segment.synthetic_share": ("segment.synthetic_share", 2),
    "training.save_every": ("image_flow.training.save_every", 0), "training.log_every": ("image_flow.training.log_every", 0),
    "training.warm_up": ("image_flow.training.warm_up", -1), "training.clip": ("image_flow.training.clip", 0),
    "times.std": ("image_flow.times.std", 0), "times.uniform_share": ("mask_flow.times.uniform_share", 2),
    "times.shift": ("mask_flow.times.shift", 0),
    "mask_flow.clip": ("mask_flow.clip", 0), "mask_flow.size": ("mask_flow.size", 0),
    "image_flow.clip": ("image_flow.clip", 0), "image_flow.condition_dropout": ("image_flow.condition_dropout", 1.5),
    "labeller.colour_strength": ("labeller.colour_strength", -1), "labeller.check_every": ("labeller.check_every", 0),
    "align.rho": ("targets.b.align.rho", -1), "align.prior_count": ("targets.b.align.prior_count", -1),
    "align.temperature": ("targets.b.align.temperature", 0), "align.queue": ("targets.b.align.queue", -1),
    "align.relabel_pairs": ("targets.b.align.relabel_pairs", 0), "align.check_every": ("targets.b.align.check_every", 0),
    "align.check_samples": ("targets.b.align.check_samples", 1), "align.patience": ("targets.b.align.patience", 0),
    "sample.batch": ("sample.batch", 0), "sample.n_steps": ("sample.n_steps", 0), "sample.area_quantile": ("sample.area_quantile", 1),
    "sample.copy_dice": ("sample.copy_dice", 2),
    "filter.outlier_limit": ("filter.outlier_limit", 0), "filter.copy_quantile": ("filter.copy_quantile", 2),
    "filter.agreement_ratio": ("filter.agreement_ratio", -1), "filter.judge_steps": ("filter.judge_steps", 0),
    "segment.check_every": ("segment.check_every", 0), "segment.colour_strength": ("segment.colour_strength", -1),
    "segment.fourier_beta": ("segment.fourier_beta", 1),
    "evaluate.bootstrap": ("evaluate.bootstrap", 0), "evaluate.level": ("evaluate.level", 95),
    "evaluate.copy_quantile": ("evaluate.copy_quantile", -1),
}

# The rest: values by dotted place -> words of the error.
OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "labels without values": ({"task.kind": "labels"}, "task.values: needs file value -> class number in 0..1, got {}"),
    "value of no class": ({"task.kind": "labels", "task.values": {0: 0, 1: 2}}, "task.values: needs file value -> class number in 0..1"),
    "value of a class that none has": ({"task.kind": "labels", "task.classes": ["liver", "tumour"], "task.values": {0: 0, 9: 1}},
                                       "task.values: no value stands for tumour"),
    "value of no pixel": ({"task.kind": "labels", "task.values": {0: 0, 70000: 1}}, "task.values: no pixel of a mask can be 70000"),
    "source without labels": ({"domains.a.labelled": False}, "domains.a.labelled: the source is learnt from"),
    "a class twice": ({"task.classes": ["disc", "disc"]}, "task.classes: disc, disc names one twice"),
    "more classes than the kind has": ({"task.classes": ["polyp", "instrument"]},
                                       "task.classes: masks of kind 'binary' have 1, got polyp, instrument"),
    "unknown baseline": ({"evaluate.baselines": ["sorce"]}, "evaluate.baselines: unknown arm 'sorce' (did you mean 'source'?)"),
    "variant of a variant": ({"targets.c": {"domain": "b", "variant_of": "b"}, "targets.d": {"domain": "b", "variant_of": "c"}},
                             "targets.d.variant_of: 'c' is itself a variant"),
    "folder and file": (TO_MOMENTS | {"targets.b.references.dir": "b"}, "references: dir and file are both given"),
    "levels of a network": ({"image_flow.network.attention": [True]}, "channels and attention must have the same length"),
    "groups of a network": ({"image_flow.network.norm_groups": 7}, "each must be a multiple of norm_groups"),
    "heads of a network": ({"image_flow.network.head_channels": 48}, "48 must divide the channels"),
    "siamese alone": ({"comparators.net.objective": "siamese"}, "go together"),
    "nothing to train on": ({"targets.b.align.denoise": "none", "targets.b.align.rho": 0}, "leaves nothing to train on"),
    "more gradient than steps": ({"targets.b.align.k": 9}, "align.k: 9 is more than align.n_steps (8); lower k (in targets.b.align)"),
    "pretrained without weights": ({"targets.b.align.encoder": "pretrained"}, "align.encoder_weights: encoder 'pretrained' needs it"),
    "weights of no encoder": ({"targets.b.align.encoder_weights": "folder"}, "align.encoder_weights: encoder 'pretrained' needs it"),
    "more rounds than steps": ({"targets.b.align.training.steps": 1}, "align.rounds: 2 is more than align.training.steps (1)"),
    "unknown arm of a target": ({"targets.b.arms": ["aligne"]}, "arms: unknown arm 'aligne' (did you mean 'aligned'?)"),
    "distance over images": (TO_MOMENTS | {"targets.b.align.reward": "mmd"}, "'mmd' compares with each of them"),
    "encoder that stays": (TO_MOMENTS | {"targets.b.align.encoder": "ssl"}, "a reference kit cannot hold 'ssl'"),
    "regions by labels": (TO_MOMENTS | {"targets.b.align.regions": "labels"}, "set align.regions=pseudo or none"),
    "denoising moments": (TO_MOMENTS | {"targets.b.align.denoise": "references"}, "set align.denoise=source"),
    "colours of moments": (TO_MOMENTS | {"targets.b.align.recolour": True}, "set align.recolour=false"),
    "rounds of moments": (TO_MOMENTS | {"targets.b.align.rounds": 2}, "set align.rounds=1"),
    "privacy of moments": (TO_MOMENTS | PRIVATE, "align.privacy.epsilon: references.file holds moments"),
    "no budget": ({"targets.b.align.privacy.epsilon": 0.0}, "align.privacy.epsilon: must be above 0"),
    "a promise that never holds": ({"targets.b.align.privacy.delta": 1.0}, "align.privacy.delta: must be between 0 and 1"),
    "a promise without noise": ({"targets.b.align.privacy.delta": 0.0}, "align.privacy.delta: must be between 0 and 1"),
    "colours of private references": (PRIVATE | {"targets.b.align.recolour": True}, "align.recolour: must be false with align.privacy.epsilon"),
    "an encoder of private references": (PRIVATE | {"targets.b.align.encoder": "ssl"}, "align.encoder: 'ssl' is trained on the references"),
    "distance of all private references": (PRIVATE | {"targets.b.align.reward": "mmd"}, "align.reward: 'mmd' is of all references together"),
    "privacy of nothing": (PRIVATE | {"targets.b.align.rho": 0}, "align.privacy.epsilon has nothing to protect"),
    "a side that U-Nets cannot halve": ({"data.size": 28}, "data.size: 28 is not a multiple of 8, and segment.network halves it 3 times; "
                                        "give a multiple, such as 24"),
    "a side of masks that cannot be halved": ({"mask_flow.size": 30}, "mask_flow.size: 30 is not a multiple of"),
    "two shares": ({"data.target_split": [0.5, 0.5]}, "data.target_split: must be"),
    "target without a test": ({"data.target_split": [0.9, 0.1, 0]}, "data.target_split: needs a share of test"),
    "negative share": ({"data.target_split": [1.2, -0.2, 0.0]}, "data.target_split: needs three shares"),
    "nothing to choose by": ({"data.source_split": [0.8, 0.0, 0.2]}, "data.source_split: needs a share of train and of val"),
    "shares of more than all": ({"data.source_split": [0.7, 0.2, 0.2]}, "data.source_split: needs three shares"),
    "unknown arm": ({"segment.arms": ["sources"]}, "segment.arms: unknown arm 'sources' (did you mean 'source'?)"),
    "no arm to compare with": ({"segment.arms": ["aligned", "oracle"]}, "evaluate.baselines: none of source, stage1 is among segment.arms"),
    "architecture twice": ({"segment.architectures": ["unet", "unet"]}, "segment.architectures: unet, unet names one twice"),
    "name that is a path": ({"targets": {"../b": {"domain": "b"}}}, "a name is letters, digits"),
    "name that begins well": ({"comparators": {"net/../x": {}}}, "comparators.net/../x: a name is letters"),
    "name of two lines": ({"comparators.net\n": {}}, "a name is letters, digits"),
    "name that is a number to DVC": ({"targets": {"08": {"domain": "b"}}}, "targets.08: YAML reads '08' as a number"),
    "source of no domain": ({"source": "c"}, "source: 'c' is not among domains"),
    "target of no domain": ({"targets.b.domain": "c"}, "targets.b.domain: 'c' is not among domains"),
    "variant of nothing": ({"targets.b.variant_of": "c"}, "targets.b.variant_of: 'c' is not among targets"),
    "painter of nothing": ({"targets.b.painter": "c"}, "targets.b.painter: 'c' is not among comparators"),
    "painter that is no flow": ({"targets.b.painter": "net"}, "targets.b.painter: stage 2 rolls out a flow, 'net' is a diffusion"),
    "source as target": ({"targets.b.domain": "a"}, "targets.b.domain: 'a' is the source"),
    "comparator named as an arm": ({"comparators.oracle": {}}, "comparators.oracle: is the name of an arm"),
    "areas of moments": (TO_MOMENTS | {"filter.match_areas": True}, "filter.match_areas: needs the reference images of every target"),
    "no target": ({"targets": {}}, "targets: none given"),
    "unknown key": ({"sede": 1}, "sede: unknown key (did you mean 'seed'?)"),
    "missing key": ({"targets.c": {}}, "targets.c.domain: missing"),
    "no section": ({"align": 1, "data": 3}, "data: must be a section, got 3"),
    "text as number": ({"seed": "x"}, "seed: must be int, got 'x'"),
    "yes as whole number": ({"seed": True}, "seed: must be int, got True"),
    "yes as number": ({"filter.outlier_limit": True}, "filter.outlier_limit: must be float, got True"),
    "NaN": ({"filter.outlier_limit": float("nan")}, "filter.outlier_limit: must be float, got nan"),
    "infinity": ({"filter.outlier_limit": float("inf")}, "filter.outlier_limit: must be float, got inf"),
    "NaN as text": ({"filter.outlier_limit": "nan"}, "filter.outlier_limit: must be float, got 'nan'"),
    "infinity as text": ({"filter.outlier_limit": "-inf"}, "filter.outlier_limit: must be float, got '-inf'"),
    "number beyond all": ({"filter.outlier_limit": 10**400}, "filter.outlier_limit: must be float, got 1000"),
    "words as number": ({"filter.outlier_limit": "much"}, "filter.outlier_limit: must be float, got 'much'"),
    "list as mapping": ({"task.values": [1]}, "task.values: must be dict"),
    "text as list": ({"segment.arms": "source"}, "segment.arms: must be tuple"),
}


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """The whole configuration with values at dotted places."""
    whole = copy.deepcopy(WHOLE)
    for place, value in changes.items():
        *sections, last = place.split(".")
        section = whole
        for key in sections:
            section = section.setdefault(key, {})
        section[last] = value
    return whole


def refusal(changes: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        build_project(changed(changes))
    return str(caught.value)


def test_a_name_is_text_to_every_reader_of_yaml() -> None:
    """DVC reads by ruamel's YAML 1.2, we by PyYAML's 1.1."""
    short = map("".join, itertools.product("0179befox_-", repeat=3))
    for word in (*short, "1e-3", "0o17", "1_0_0", "0x1F", "2001-01-01", "null", "True", "no", "off", "y", "nan"):
        if re.fullmatch(config.NAME_PATTERN, word):
            read = str(YAML(typ="safe", pure=True).compose(word).tag), str(yaml.compose(word, yaml.SafeLoader).tag)
            assert (wrong_name(word) == "") == all(tag.endswith(":str") for tag in read), word


def test_the_whole_configuration_is_fine() -> None:
    assert build_project(changed({})).targets["b"].domain == "b" and build_project(changed(TO_MOMENTS)).targets["b"].references.file
    assert build_project(changed(PRIVATE)).targets["b"].align.privacy.epsilon == 8
    assert build_project(changed({"filter.outlier_limit": "1e-3"})).filter.outlier_limit == 0.001, "YAML 1.1 reads it as text"


@pytest.mark.parametrize("key", RANGES)
def test_a_value_out_of_range(key: str) -> None:
    place, value = RANGES[key]
    assert f"{key}: " in refusal({place: value})


@pytest.mark.parametrize("name", OTHERS)
def test_a_value_that_does_not_fit(name: str) -> None:
    changes, words = OTHERS[name]
    assert words in refusal(changes)


def ranges_in_the_source() -> dict[str, str]:
    """Key -> the line that checks it, of the rules that are one call."""
    text = Path(config.__file__).read_text(encoding="utf-8")
    return {match[2]: match[0] for match in re.finditer(r"\b(one_of|at_least|between|positive)\(\"([^\"]+)\", .*", text)}


def test_every_range_has_a_value_that_breaks_it() -> None:
    assert set(ranges_in_the_source()) == set(RANGES)


@pytest.mark.parametrize(("check", "fine", "wrong"), [
    (lambda value: one_of("x", value, ("a", "b")), "a", "c"), (lambda value: at_least("x", value, 2), 2, 1.9),
    (lambda value: positive("x", value), 0.1, 0), (lambda value: between("x", value, 0, 1), 1, 1.1),
    (lambda value: between("x", value, 0, 1), 0, -0.1),
], ids=["one of", "at least", "positive", "above", "below"])
def test_the_checks_themselves(check: Any, fine: Any, wrong: Any) -> None:
    check(fine)
    with pytest.raises(InputError, match=r"^x: "):
        check(wrong)


@pytest.mark.parametrize(("content", "words"), [
    (None, "cannot be read"), (b"a: [", "not valid YAML"), (b"\xff\xfe\xff", "not valid YAML"), (b"- 1", "must be a mapping"),
    (b"{}", "source: missing")], ids=["gone", "broken", "bytes", "list", "empty"])
def test_files_that_are_no_configuration(content: bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=f"{file}: .*{words}"):
        load_project(file)


def test_yaml_that_names_code_is_not_run(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "params.yaml").write_text(f"!!python/object/apply:os.system ['touch {canary}']")
    with pytest.raises(InputError, match="not valid YAML"):
        load_project(tmp_path / "params.yaml")
    assert not canary.exists()
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(WHOLE))
    assert load_project(tmp_path / "params.yaml").source == "a"
