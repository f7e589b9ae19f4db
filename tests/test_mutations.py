"""Each rule, once switched off, must make its test fail: one mutation of the source at a time, in a copy of the package.

A mutation replaces text that stands once in a file of the package. It counts as caught where every test named fails by its own
assertions; an error of set-up or collection, or a name that the mutation broke, does not count.
"""

import ast
import faulthandler
import gc
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_config import ranges_in_the_source

REPOSITORY = Path(__file__).parents[1]
PACKAGE = REPOSITORY / "alignflow_core"
OURS = re.compile(r"(alignflow_core|pipelines|tests|test_\w+|conftest|toy_project)(\.|$)")
SECONDS = 600
TELLS = r"problems(\.append\(| \+?= \[[^\]])|yield f['\"]"  # statements that tell a problem
NEVER = "ZeroDivisionError"  # an error that none of these places raises


@dataclass(frozen=True)
class Mutation:
    """``file`` of the package in which ``old`` becomes ``new``; ``tests`` are node ids without ``tests/test_``."""

    file: str
    rule: str
    old: str
    new: str
    tests: tuple[str, ...]


def folder(*names: str) -> tuple[str, ...]:
    return tuple(f"bad_input.py::test_each_problem_names_file_and_cause[{name}]" for name in names)


def setting(*names: str) -> tuple[str, ...]:
    return tuple(f"config.py::test_a_value_that_does_not_fit[{name}]" for name in names)


def bad(name: str) -> tuple[str, ...]:
    return (f"bad_input.py::test_{name}",)


def data(name: str) -> tuple[str, ...]:
    return (f"data.py::test_{name}",)


def kit(*names: str) -> tuple[str, ...]:
    return tuple(f"reference_kit.py::test_{name}" for name in names)


def numbers(*names: str) -> tuple[str, ...]:
    return kit(*(f"a_file_of_impossible_numbers_is_refused[{name}]" for name in names))


def last(*names: str) -> tuple[str, ...]:
    return tuple(f"reliability.py::test_{name}" for name in names)


CHECKPOINTS = ("hostile.py::test_hostile_checkpoints_are_refused",)
WHOLE_FILES = "bytes_are_on_the_disk_before_a_file_gets_its_name[{}]"
BY_NAME = last(*(WHOLE_FILES.format(name) for name in ("save_state", "save_network", "write_json", "write_moments")))
FOLDERS_MISSING = bad("missing_and_empty_folders")
GROUPS = bad("groups_as_spreadsheets_write_them")

# File -> (rule, text in the source, text that switches the rule off, tests). ``None`` switches off an ``if`` or ``elif``.
TABLE: dict[str, list[tuple[str, str, str | None, tuple[str, ...]]]] = {
    "readers.py": [
        ("links out of the folder", "if not file.resolve().is_relative_to(root.resolve()):", None, folder("link out of the folder")),
        ("pipes are not waited for", "flags | os.O_NONBLOCK", "flags", bad("a_pipe_does_not_hang_the_check")),
        ("regular files alone", "if not stat.S_ISREG(status.st_mode):", None, folder("pipe")),
        ("bytes of a file", "if status.st_size > MAX_BYTES:", None, folder("too many bytes")),
        ("bytes read", "stream.read(MAX_BYTES + 1)", "stream.read()", bad("a_file_that_hides_its_size_is_read_up_to_the_limit")),
        ("files that cannot be opened", "except (OSError, RuntimeError) as error:", f"except {NEVER} as error:",
         folder("link to nothing", "link to itself", "folder named as an image", "groups that are a folder")),
        ("whatever a decoder raises", "except Exception as error:", f"except {NEVER} as error:", (*folder("truncated PNG"), *bad("truncated_jpeg"))),
        ("formats", "formats=FORMATS", "formats=None", (*folder("other format"), *bad("a_file_that_is_no_picture_is_not_decoded_by_others"))),
        ("no picture", "except Image.UnidentifiedImageError:", f"except {NEVER}:", folder("text behind .png", "empty file")),
        ("bombs beyond the decoder's own limit", "except Image.DecompressionBombError:", f"except {NEVER}:", folder("bomb")),
        ("pixels", "if width * height > MAX_PIXELS:", None, folder("large")),
        ("frames and pages", 'if frames > 1 and image.format != "MPO":', None, folder("animation", "pages")),
        ("a camera's preview", ' and image.format != "MPO"', "", bad("a_camera_s_preview_is_no_second_frame")),
        ("floating point", 'if image.mode == "F":', None, folder("floating point")),
        ("turned as EXIF says", "upright = ImageOps.exif_transpose(image)", "upright = image", data("exif_orientation_turns_image_and_size")),
        ("size turned as EXIF says", "if upright.size == image.size[::-1] and", "if False and", data("exif_orientation_turns_image_and_size")),
        ("16 bit images", "if image.mode in WIDE_MODES:\n            image", "if False:\n            image", data("sixteen_bit_grey_is_scaled")),
        ("values below 0", "values.min(initial=0) < 0 or ", "", folder("values below 0")),
        ("values above 65535", " or values.max(initial=0) > 65535", "",
         (*folder("values above 65535"), *bad("label_masks_of_one_bit_and_wide_binary_ones"))),
        ("transparency", "if image.has_transparency_data:", None, data("one_bit_grey_and_transparency")),
        ("wide masks of few values", "values.astype(np.uint8) if values.min(initial=0) >= 0 and values.max(initial=0) <= 255 else _to_8_bit(values)",
         "_to_8_bit(values)", data("binary_masks_of_any_mode")),
        ("one bit labels of 1", "(1 if 1 in task.values else 255)", "255", bad("label_masks_of_one_bit_and_wide_binary_ones")),
        ("one bit labels of 255", "(1 if 1 in task.values else 255)", "1", bad("label_masks_of_one_bit_and_wide_binary_ones")),
        ("wide labels", "if image.mode in WIDE_MODES:\n        return _wide(image)", "if False:\n        return _wide(image)",
         data("label_masks_by_value_palette_and_wide")),
        ("palette labels", 'if image.mode in ("L", "P"):', 'if image.mode == "L":', data("label_masks_by_value_palette_and_wide")),
        ("coloured label masks", "if (channels != channels[..., :1]).any():", None, bad("hidden_files_are_ignored_and_coloured_label_masks_refused")),
        ("unknown labels", "if unknown:", None, folder("unknown label")),
        ("binary threshold", "values >= task.threshold", "values > task.threshold", data("binary_masks_of_any_mode")),
        ("disc threshold", "(values < 192)", "(values <= 192)", data("refuge_masks_by_midpoints")),
        ("cup threshold", "(values < 64)", "(values <= 64)", data("refuge_masks_by_midpoints")),
        ("nested regions", "np.stack([c > 127 for c in cover])", "np.stack([c > 0 for c in cover])", data("resizing_keeps_nesting_and_area")),
    ],
    "folders.py": [
        ("missing folder", "if not folder.is_dir():", None, FOLDERS_MISSING),
        ("missing images or masks", "[:1 + labelled] if not each.is_dir()]", "[:1 + labelled] if False]", FOLDERS_MISSING),
        ("missing images or masks end the check", "if problems:\n        raise InputError(*problems)", "if False:\n        pass", FOLDERS_MISSING),
        ("no image at all", "if not images:", None, FOLDERS_MISSING),
        ("images without mask", "for s in images.keys() - masks.keys()]", "for s in ()]", folder("no mask")),
        ("masks without image", "for s in masks.keys() - images.keys()]", "for s in ()]", folder("no image")),
        ("sizes of partners", "if image and mask and (image.width", "if False and (image.width", folder("other size")),
        ("no foreground anywhere", "if labelled and cases and all(", "if False and all(",
         bad("masks_without_any_foreground_are_kept_unless_all_are")),
        ("problems are raised", "if problems:\n        raise InputError(*sorted(problems))", "if False:\n        pass",
         bad("all_problems_are_listed_together")),
        ("problems are collected", "except ReadError as error:\n        problems", f"except {NEVER} as error:\n        problems",
         folder("truncated PNG")),
        ("hidden files", 'name.startswith(".") or ', "", bad("hidden_files_are_ignored_and_coloured_label_masks_refused")),
        ("files of file managers", "(*IGNORED, *ignored)", "ignored", bad("hidden_files_are_ignored_and_coloured_label_masks_refused")),
        ("masks and groups beside images", "(*IGNORED, *ignored)", "IGNORED", bad("references_beside_their_masks_and_groups")),
        ("names that cannot be written", 'if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):', None,
         bad("names_that_cannot_be_written_are_told")),
        ("suffixes", "if suffix.lower() not in SUFFIXES:", None, folder("other suffix", "folder among images")),
        ("names that differ in case", "stem.casefold()", "stem", bad("stems_that_differ_in_case_alone")),
        ("one stem twice", "if other != name:", None, folder("same stem twice")),
        ("groups however capitalised", "if file.name.lower() in GROUP_FILES", "if file.name in GROUP_FILES", folder("groups of other capitals")),
        ("groups that cannot be read", "in folder.iterdir() if file.name", "in folder.iterdir() if file.is_file() and file.name",
         folder("groups that are gone", "groups that are a folder")),
        ("two group files", 'problems += [f"{file}: two group files in one folder; keep one" for file in files[1:]]', "pass",
         folder("two group files")),
        ("groups inside the folder", "read_bytes(file, root).decode", "file.read_bytes().decode", folder("groups of another folder")),
        ("mark of spreadsheets", '"utf-8-sig"', '"utf-8"', GROUPS),
        ("quotes that end", ", strict=True))", "))", folder("quote without end")),
        ("groups that are no text", "except (ReadError, UnicodeDecodeError, csv.Error) as error:", "except ReadError as error:",
         folder("binary groups", "quote without end")),
        ("groups that are no file", "except (ReadError, UnicodeDecodeError, csv.Error) as error:", "except (UnicodeDecodeError, csv.Error) as error:",
         folder("groups that are gone")),
        ("no line of groups", "if not rows or ", "if ", folder("empty groups")),
        ("columns of the header", "len(rows[0]) < 2 or ", "", folder("one column", "empty line before the header")),
        ("header", ' or rows[0][0].strip() != "stem"', "", folder("no header")),
        ("empty lines of groups", "if not any(cell.strip() for cell in row):", None, GROUPS),
        ("a stem without group", "if not group:", None, folder("no group")),
        ("a group of no image", "elif stem not in stems:", None, folder("group of an unknown stem")),
        ("two groups of an image", "groups.setdefault(stem, group) != group:", "groups.setdefault(stem, group) is None:", folder("two groups")),
        ("equal images share a group", "parent[b] = a", "parent[b] = b", data("equal_images_share_a_group_and_a_split")),
        ("links inside the project", "root = folder if root is None or not folder.is_relative_to(root.resolve()) else root.resolve()",
         "root = folder",
         bad("links_may_lead_to_other_data_of_the_project")),
        ("a folder beside the project", " or not folder.is_relative_to(root.resolve())", "", bad("links_may_lead_to_other_data_of_the_project")),
    ],
    "data.py": [
        ("groups to split", "if len(sizes) < len(wanted):", None, data("splits_never_cut_a_group_and_hit_the_shares")),
        ("no split without a group", "len(empty) < left or s in empty", "True", data("splits_never_cut_a_group_and_hit_the_shares")),
        ("number of references", "if len(table) < wanted.count:", None, bad("more_references_than_training_images")),
        ("test images that the source learns from", "if len(shared):", None, bad("test_images_that_the_source_learns_from_stop_the_run")),
        ("the source's own test images may be shared", 'source[source["split"] != "test"]', "source",
         bad("test_images_that_the_source_learns_from_stop_the_run")),
        ("references of a test image's content", "if sha256 in contents:", None, bad("references_that_are_test_images_stop_the_run")),
        ("references of a test image's patient", "elif group in by_group:", None, bad("references_that_are_test_images_stop_the_run")),
        ("test images among references are raised", "if problems:\n        raise InputError(*problems)", "if False:\n        pass",
         bad("references_that_are_test_images_stop_the_run")),
        ("ids of another key", 'if read_json(folder / KEY_FILE)["key_check"] != key_check():', None,
         ("site_key.py::test_another_key_changes_ids_and_nothing_else",)),
        ("pixels in the order of their rows", "np.save(file, np.load(file)[order])", "pass", bad("references_of_a_folder_are_in_a_drawn_order")),
        ("moments of another size", 'if given.instrument.get("size") != size:', None, kit("moments_of_another_size")),
    ],
    "validation.py": [
        ("sections", "if not isinstance(value, dict):", None, setting("no section")),
        ("unknown keys", "for key in value if key not in hints]", "for key in () if key not in hints]", setting("unknown key")),
        ("missing keys", "if f.name not in value and f.default", "if False and f.default", setting("missing key")),
        ("the place of a problem", "except InputError as error:", f"except {NEVER} as error:", setting("more gradient than steps")),
        ("length of a list", "if len(each) == len(value):", "if True:", setting("two shares")),
        ("mappings", "elif origin is dict and isinstance(value, dict):", "elif origin is dict:", setting("list as mapping")),
        ("lists", "if origin is tuple and isinstance(value, list | tuple):", "if origin is tuple:", setting("text as list")),
        ("yes is no number", "and not isinstance(value, bool):", "and True:", setting("yes as number")),
        ("finite numbers", "if math.isfinite(number := float(value)):", "if (number := float(value)) is not None:",
         setting("NaN", "infinity", "NaN as text", "infinity as text")),
        ("numbers beyond all", "suppress(ValueError, OverflowError)", "suppress(ValueError)", setting("number beyond all")),
        ("words as numbers", "suppress(ValueError, OverflowError)", "suppress(OverflowError)", setting("words as number")),
        ("yes is no whole number", "type(value) is kind", "isinstance(value, kind)", setting("yes as whole number")),
        ("types", 'problems.append(f"{where}: must be {getattr', 'str(f"{where}: must be {getattr', setting("text as number", "text as list")),
        ("one of several", "if value not in valid:", None, ("config.py::test_the_checks_themselves[one of]",)),
        ("least value", "if value < low:", None, ("config.py::test_the_checks_themselves[at least]",)),
        ("above 0", "if not value > 0:", None, ("config.py::test_the_checks_themselves[positive]",)),
        ("lower end", "if not low <= value <= high:", "if not value <= high:", ("config.py::test_the_checks_themselves[below]",)),
        ("upper end", "if not low <= value <= high:", "if not low <= value:", ("config.py::test_the_checks_themselves[above]",)),
    ],
    "config.py": [
        ("labels without values", "if not self.values or wrong:", "if wrong:", setting("labels without values")),
        ("labels of no class", "if not self.values or wrong:", "if not self.values:", setting("value of no class")),
        ("labels of every class", "if unseen:", None, setting("value of a class that none has")),
        ("values of pixels", "if beyond:", None, setting("value of no pixel")),
        ("labels of the source", "elif not self.domains[self.source].labelled:", "elif False:", setting("source without labels")),
        ("test images of targets", "if not self.target_split[2]:", None, setting("target without a test")),
        ("classes once", "if len(set(self.classes)) < len(self.classes):", None, setting("a class twice")),
        ("classes of a kind", "if self.kind in KIND_CLASSES and", "if False and", setting("more classes than the kind has")),
        ("baselines", "for arm in self.evaluate.baselines if arm not in arms]", "for arm in self.evaluate.baselines if False]",
         setting("unknown baseline")),
        ("arms to compare with", "if measured and not {*self.segment.arms, *others} & set(self.evaluate.baselines):", None,
         setting("no arm to compare with")),
        ("sides are told", "problems += self._odd_sides()", "problems += []",
         setting("a side that U-Nets cannot halve", "a side of masks that cannot be halved")),
        ("sides", "if side % (step := 2 ** (len(channels) - 1))]", "if 0 % (step := 2 ** (len(channels) - 1))]",
         setting("a side that U-Nets cannot halve", "a side of masks that cannot be halved")),
        ("variants of targets", "if target.variant_of in self.targets and self", "if False and self", setting("variant of a variant")),
        ("one kind of references", "if self.dir is not None and self.file is not None:", None, setting("folder and file")),
        ("levels", "if len(self.channels) != len(self.attention):", None, setting("levels of a network")),
        ("norm groups", "if any(c % self.norm_groups for c in self.channels):", None, setting("groups of a network")),
        ("heads", "if any(c % self.head_channels for", "if False and any(c % self.head_channels for", setting("heads of a network")),
        ("siamese", 'if (self.objective == "siamese") != (self.conditioner == "dense_controlnet"):', None, setting("siamese alone")),
        ("something to train on", 'if self.denoise == "none" and self.rho == 0:', None, setting("nothing to train on")),
        ("calls with gradient", "if self.k > self.n_steps:", None, setting("more gradient than steps")),
        ("weights of an encoder", 'if (self.encoder == "pretrained") != (self.encoder_weights is not None):', None,
         setting("pretrained without weights", "weights of no encoder")),
        ("steps of rounds", "if self.rounds > self.training.steps:", None, setting("more rounds than steps")),
        ("arms of a target", "if unknown:\n            raise InputError(*(f\"arms:", "if False:\n            raise InputError(*(f\"arms:",
         setting("unknown arm of a target")),
        ("what a file of moments cannot do", "if self.references.file is not None:", None, setting("distance over images", "rounds of moments")),
        ("what a file of moments cannot do is raised", "if problems:\n                raise InputError(*problems)", "if False:\n                pass",
         setting("distance over images")),
        ("distances from moments", "if align.reward not in FROM_MOMENTS:", None, setting("distance over images")),
        ("encoders that travel", "if align.encoder not in PORTABLE_ENCODERS:", None, setting("encoder that stays")),
        ("moments without labels", 'if align.regions == "labels":', None, setting("regions by labels")),
        ("moments without images to denoise", 'if align.denoise == "references":', None, setting("denoising moments")),
        ("moments without colours", "if align.recolour:", None, setting("colours of moments")),
        ("moments in one round", 'if align.regions == "pseudo" and align.rounds != 1:', None, setting("rounds of moments")),
        ("moments are not private", "if align.privacy.epsilon is not None:", None, setting("privacy of moments")),
        ("a budget above 0", "if self.epsilon is not None and not self.epsilon > 0:", None, setting("no budget")),
        ("a promise that can hold", "if not 0 < self.delta < 1:", None, setting("a promise that never holds", "a promise without noise")),
        ("private references", "if self.privacy.epsilon is not None:", None, setting("colours of private references")),
        ("private references seen without noise", "for name, value in needed.items() if getattr(self, name) != value]", "for name, value in ()]",
         setting("colours of private references")),
        ("encoders of private references", 'if self.encoder == "ssl":', None, setting("an encoder of private references")),
        ("distances of private references", "if self.reward not in FROM_MOMENTS:", None, setting("distance of all private references")),
        ("something to protect", "if self.rho == 0:", None, setting("privacy of nothing")),
        ("problems of privacy are raised", "if problems:\n            raise InputError(*problems)\n\n\n@dataclass",
         "if False:\n            pass\n\n\n@dataclass",
         setting("privacy of nothing")),
        ("shares not below 0", "min(split) < 0 or ", "", setting("negative share")),
        ("shares of all", " or abs(sum(split) - 1) > 1e-6", "", setting("shares of more than all")),
        ("pairs to choose by", "if not all(self.source_split[:2]):", None, setting("nothing to choose by")),
        ("arms", "if unknown:\n            raise InputError(*(f\"segment", "if False:\n            raise InputError(*(f\"segment",
         setting("unknown arm")),
        ("architectures once", "if len(set(self.architectures)) < len(self.architectures):", None, setting("architecture twice")),
        ("names are no paths", "if not re.fullmatch(NAME_PATTERN, name):", "if False:", setting("name that is a path")),
        ("names are told", "if (why := wrong_name(name))]", "if (why := '')]", setting("name that is a path", "name that is a number to DVC")),
        ("names are no numbers", "if re.fullmatch(NO_TEXT, name) else", "if False else", setting("name that is a number to DVC")),
        ("names as a whole", "re.fullmatch(NAME_PATTERN, name)", "re.match(NAME_PATTERN, name)",
         setting("name that begins well", "name of two lines")),
        ("source", "if self.source not in self.domains:", None, setting("source of no domain")),
        ("domain of a target", "if target.domain not in self.domains:", None, setting("target of no domain")),
        ("variants", "elif target.variant_of is not None and target.variant_of not in self.targets:", None, setting("variant of nothing")),
        ("painters", "elif target.painter is not None and target.painter not in self.comparators:", None, setting("painter of nothing")),
        ("painters are flows", 'elif target.painter is not None and self.comparators[target.painter].process != "flow":', None,
         setting("painter that is no flow")),
        ("source is no target", "elif target.domain == self.source:", None, setting("source as target")),
        ("comparators are no arms", "for name in self.comparators if name in ARMS]", "for name in self.comparators if False]",
         setting("comparator named as an arm")),
        ("areas need images", "if self.filter.match_areas:", None, setting("areas of moments")),
        ("a target at least", "if not self.targets:", None, setting("no target")),
        ("problems of a project are raised", "if problems:\n            raise InputError(*problems)\n\n    @cached_property",
         "if False:\n            pass\n\n    @cached_property", setting("no target")),
        ("problems of a file are raised", "if problems:\n        raise InputError(*(f", "if False:\n        raise InputError(*(f",
         setting("unknown key")),
        ("YAML that names code", 'getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)', "yaml.UnsafeLoader(text)",
         ("config.py::test_yaml_that_names_code_is_not_run",)),
        ("no file", "except OSError as error:", f"except {NEVER} as error:", ("config.py::test_files_that_are_no_configuration[gone]",)),
        ("no YAML", "except (yaml.YAMLError, UnicodeDecodeError) as error:", "except UnicodeDecodeError as error:",
         ("config.py::test_files_that_are_no_configuration[broken]",)),
        ("no text", "except (yaml.YAMLError, UnicodeDecodeError) as error:", "except yaml.YAMLError as error:",
         ("config.py::test_files_that_are_no_configuration[bytes]",)),
        ("no mapping", "if not isinstance(raw, dict):", None, ("config.py::test_files_that_are_no_configuration[list]",)),
    ],
    "checkpoint.py": [
        ("config of a network", "if not isinstance(config, dict):", None, CHECKPOINTS),
        ("weights that are gone", "if not file.exists() or ", "if ", last("damaged_networks_are_refused")),
        ("hash of weights", ' or file_hash(file) != config.get("weights_sha256")', "", last("damaged_networks_are_refused")),
        ("laid out without memory", 'with torch.device("meta"):', 'with torch.device("cpu"):', last("a_network_is_laid_out_before_it_gets_memory")),
        ("weights of another network", "if expected != {name: value.shape for name, value in weights.items()}:", None,
         last("a_network_is_laid_out_before_it_gets_memory")),
        ("configs of anything", "except (InputError, KeyError, TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:",
         f"except {NEVER} as error:", CHECKPOINTS),
        ("tensors that are none", "except (OSError, SafetensorError) as error:", f"except {NEVER} as error:", CHECKPOINTS),
    ],
    "artifact.py": [
        ("bytes on the disk", "os.fsync(stream.fileno())", "pass",
         BY_NAME),
        ("all bytes on the disk", "stream.write(piece)\n            stream.flush()", "stream.write(piece)",
         last(WHOLE_FILES.format("write_json"))),
        ("nothing written in place", 'part = file.with_name(f".{file.name}.part{os.getpid()}")', "part = file",
         BY_NAME),
        ("no half file on a full disk", "part.unlink(missing_ok=True)", "pass", last("a_full_disk_leaves_what_was_there")),
        ("JSON", "except (OSError, ValueError) as error:", f"except {NEVER} as error:", kit("a_folder_that_is_no_kit")),
        ("an artifact's bytes on the disk", "os.fsync(descriptor)\n        os.close", "os.close", last(WHOLE_FILES.format("publish"))),
        ("an artifact appears whole", "part_dir.rename(out_dir)", "shutil.copytree(part_dir, out_dir)", last(WHOLE_FILES.format("publish"))),
        ("an artifact's name lasts", "sync_folder(out_dir.parent)", "pass", last("a_name_lasts_through_a_loss_of_power[publish]")),
        ("one process", "fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)", "pass", last("twenty_processes_on_one_folder")),
        ("one process, the others told", "if wait is None:", None, last("twenty_processes_on_one_folder")),
    ],
    "state.py": [
        ("hash of a state", 'if digest(saved.read_bytes()) == saved.name.split(".")[-2]:', "if True:",
         last("damaged_states_fall_back_to_the_one_before")),
        ("the state before", "KEPT = 2", "KEPT = 1", last("damaged_states_fall_back_to_the_one_before")),
        ("the latest first", ", reverse=True)", ")", last("damaged_states_fall_back_to_the_one_before")),
        ("a full disk is told", "except OSError as error:", f"except {NEVER} as error:", last("a_full_disk_leaves_what_was_there")),
        ("a full disk", "if error.errno not in (errno.ENOSPC, errno.EDQUOT):", "if True:", last("a_full_disk_leaves_what_was_there")),
        ("a state's name lasts", "sync_folder(file.parent)", "pass", last("a_name_lasts_through_a_loss_of_power[save_state]")),
        ("nothing of a killed save stays", "leftover.unlink(missing_ok=True)", "pass", last("what_a_killed_save_left_goes")),
        ("space", "if free < needed:", None, last("too_little_space_is_told_before_the_work")),
    ],
    "flow/train.py": [
        ("finite losses and gradients", "if bad:", None, last("numbers_that_are_none_stop_before_they_are_saved")),
    ],
    "runner.py": [
        ("hash of an artifact", ' and provenance["content"] == tree_hash(folder)', "", last("an_altered_artifact_is_built_again")),
        ("work of other settings", "if not (marker.exists() and marker.read_text() == fingerprint):", "if not marker.exists():",
         last("work_begun_with_other_settings_is_not_taken_up")),
        ("no half artifact after a failure", "shutil.rmtree(part_dir, ignore_errors=True)\n            if started > 0:", "if started > 0:",
         bad("command_exits_2_and_writes_nothing")),
    ],
    "pairs.py": [
        ("labels of the unlabelled", "if self.masks is None:", None, data("references_from_a_folder_without_labels")),
        ("arrays", "except (OSError, ValueError) as error:", f"except {NEVER} as error:", data("arrays_that_are_none")),
        ("arrays that hold code", "allow_pickle=False", "allow_pickle=True", data("arrays_that_are_none")),
    ],
    "reference_moments.py": [
        ("file of moments", "except ReadError as error:", f"except {NEVER} as error:", kit("a_file_of_too_many_bytes_is_not_parsed")),
        ("bytes of moments", "if len(data) > MAX_BYTES:", None, kit("a_file_of_too_many_bytes_is_not_parsed")),
        ("what is no file of moments", "except (ValueError, KeyError, TypeError, AttributeError, SafetensorError, RecursionError) as error:",
         f"except {NEVER} as error:", kit("a_damaged_or_edited_file_is_refused")),
        ("format", 'if facts.get("format") != FORMAT:', None, kit("a_file_of_another_format_is_refused")),
        ("types of tensors", 'each["dtype"] not in ("F32", "I64") or ', "", numbers("doubles")),
        ("axes of tensors", ' or len(each["shape"]) != 1', "", numbers("pixels")),
        ("checksum", 'if facts.get("sha256") != _digest(', "if False and facts != _digest(", kit("a_damaged_or_edited_file_is_refused[edited]")),
        ("parts", "not set(n_images) <= set(ROLES) or ", "", numbers("an unknown part")),
        ("an aligning part", ' or "align" not in n_images', "", numbers("no aligning part")),
        ("numbers of images", "type(n) is int and n >= 1 for n", "n >= 1 for n", numbers("half an image")),
        ("images of a part", "type(n) is int and n >= 1 for n", "type(n) is int for n", numbers("a part of no images")),
        ("five images", "if sum(n_images.values()) < LEAST_IMAGES:", None, numbers("fewer than five")),
        ("length of means", "mean.shape != like.shape or ", "", numbers("other length")),
        ("length of variances", "variance.shape != like.shape or ", "", numbers("other length of variances")),
        ("variances not below 0", "(variance < 0).any() or ", "", numbers("negative variance")),
        ("counts", " or not 1 <= count <= n_images[role]:", ":", numbers("count of none")),
        ("moments of whole images", "if not found or found[0] is None or found[0].count != n_images[role]:", None,
         numbers("no whole image", "more images than measured")),
        ("no other tensors", "if left:", None, numbers("moments of no set")),
        ("finite moments", "or not np.isfinite(values).all():", "or False:", numbers("NaN")),
    ],
    "reference_instrument.py": [
        ("another kit", "if differing:", None, kit("moments_of_another_instrument")),
        ("another encoder", "if not same_probe(given.probe, probe):", None, kit("moments_of_another_instrument")),
        ("sets of a probe", "len(one) == len(other) and all(", "all(", kit("moments_of_another_instrument")),
        ("length of a probe", "a.shape == b.shape and ", "", kit("moments_of_another_instrument")),
    ],
    "reference_kit.py": [
        ("a new folder", "if out.exists():\n        raise", "if False:\n        raise", kit("a_kit_is_written_to_a_new_folder")),
        ("encoders that travel", "if chosen.align.encoder not in PORTABLE_ENCODERS:", None, kit("what_cannot_travel_makes_no_kit")),
        ("regions that travel", 'if chosen.align.regions == "labels":', None, kit("what_cannot_travel_makes_no_kit")),
        ("what cannot travel is raised", "if problems:\n        raise InputError(*problems)", "if False:\n        pass",
         kit("what_cannot_travel_makes_no_kit")),
        ("a new file", "if out.exists() or ", "if ", kit("moments_are_written_to_a_new_file")),
        ("a file of moments by its name", ' or out.suffix != ".safetensors":', ":", kit("moments_are_written_to_a_new_file")),
        ("kits of nonsense", "except (KeyError, TypeError, ValueError, RuntimeError) as error:", f"except {NEVER} as error:",
         kit("a_kit_of_nonsense_is_refused")),
        ("five different images", "if different < LEAST_IMAGES:", None, kit("fewer_than_five_different_images_are_refused")),
        ("format of a kit", 'facts.get("format") != FORMAT or ', "", kit("a_kit_of_nonsense_is_refused")),
        ("what kit.json is", "if not isinstance(facts, dict) or ", "if ", kit("a_folder_that_is_no_kit")),
        ("list of files", ' or not isinstance(facts.get("files"), dict):', ":", kit("a_kit_of_nonsense_is_refused")),
        ("names of files", "name not in known or ", "", kit("a_kit_of_nonsense_is_refused")),
        ("files that are gone", "not (kit / name).is_file() or ", "", kit("a_kit_of_nonsense_is_refused")),
        ("hashes of files", " or file_hash(kit / name) != sha256)", ")", kit("an_altered_kit_is_refused")),
        ("statistics", "if wrong or STATISTICS not in", "if wrong and STATISTICS not in", kit("a_kit_of_nonsense_is_refused")),
        ("task of a kit", "if problems:\n        raise ValueError(problems[0])", "if False:\n        pass", kit("a_kit_of_nonsense_is_refused")),
        ("networks of a kit", "if instrument[name] is not None and", "if False and", kit("a_kit_of_nonsense_is_refused")),
        ("encoder of a kit", 'if instrument["encoder"] not in PORTABLE_ENCODERS:', None, kit("a_kit_of_nonsense_is_refused")),
        ("what a kit's encoder sees", "if not same_probe(", "if False and same_probe(", kit("a_kit_whose_encoder_sees_otherwise_here_is_refused")),
    ],
    "site_key.py": [
        ("a key that is none", "except (OSError, ValueError) as error:", f"except {NEVER} as error:", ("site_key.py::test_bad_keys",)),
        ("a key for others to read", "if mode & 0o077:", None, ("site_key.py::test_bad_keys",)),
        ("a short key", "if len(key) < LEAST_BYTES:", None, ("site_key.py::test_bad_keys",)),
    ],
    "floors.py": [
        ("old packages", "if below(installed, floor):", None, ("floors.py::test_a_stage_refuses_an_old_package",)),
        ("old packages are raised", "if problems:", None, ("floors.py::test_a_stage_refuses_an_old_package",)),
    ],
}


def mutations() -> Iterator[Mutation]:
    for file, rows in TABLE.items():
        for rule, old, new, tests in rows:
            yield Mutation(file, rule, old, f"{old.split()[0]} False:" if new is None else new, tests)
    for key, line in ranges_in_the_source().items():
        yield Mutation("config.py", f"range of {key}", line, "pass", (f"config.py::test_a_value_out_of_range[{key}]",))


MUTATIONS = list(mutations())


def outcomes(folder: Path, tests: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """Node id -> (``passed``, ``failure`` or ``error``, its message), of tests run on the packages in ``folder``.

    In a forked child, which has the libraries loaded and nothing of ours.
    """
    report, log = folder / "report.xml", folder / "log"
    pid = os.fork()
    if not pid:
        try:
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            sys.stdout = sys.stderr = log.open("w", encoding="utf-8")
            os.chdir(folder)
            os.environ |= {"PYTHONPATH": str(folder), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
            gc.freeze()  # what was there before the fork need not be searched for waste
            sys.path[:] = [str(folder), *(each for each in sys.path if Path(each or ".") not in (REPOSITORY, REPOSITORY / "tests"))]
            for name in [name for name in sys.modules if OURS.match(name)]:
                del sys.modules[name]
            pytest.main(["-p", "no:cacheprovider", f"--junitxml={report}", f"--basetemp={folder / 'tmp'}",
                         *(f"tests/test_{test}" for test in tests)])
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    assert report.exists(), f"the tests did not run:\n{log.read_text(encoding='utf-8')[-3000:]}"
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):  # noqa: S314
        told = next((each for each in case if each.tag in ("failure", "error", "skipped")), None)
        found[f"{case.get('classname', '').removeprefix('tests.test_')}.py::{case.get('name')}"] = \
            ("passed", "") if told is None else (told.tag, told.get("message", ""))
    return found


def copied(to: Path) -> Path:
    """A copy of the packages with their tests."""
    for name in ("alignflow_core", "pipelines", "tests"):
        shutil.copytree(REPOSITORY / name, to / name)
    shutil.copyfile(REPOSITORY / "pyproject.toml", to / "pyproject.toml")
    return to


def cases(found: dict[str, tuple[str, str]], test: str) -> list[tuple[str, str]]:
    """What came of a test, with all of its parameters where its name has none."""
    return [outcome for name, outcome in found.items() if name == test or name.startswith(f"{test}[")]


@pytest.fixture(scope="module")
def unmutated(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The same tests on an unchanged copy."""
    import monai.networks.nets  # noqa: F401  for the children
    import pyarrow.parquet  # noqa: F401
    return outcomes(copied(tmp_path_factory.mktemp("unmutated")), tuple(dict.fromkeys(test for each in MUTATIONS for test in each.tests)))


@pytest.mark.nightly
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda each: f"{each.file}: {each.rule}")
def test_without_its_rule_its_test_fails(mutation: Mutation, unmutated: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    for test in mutation.tests:
        assert {kind for kind, _ in cases(unmutated, test)} == {"passed"}, f"{test} fails without a mutation, or there is none of that name"
    file = copied(tmp_path) / "alignflow_core" / mutation.file
    file.write_text(file.read_text(encoding="utf-8").replace(mutation.old, mutation.new), encoding="utf-8")
    found = outcomes(tmp_path, mutation.tests)
    for test in mutation.tests:
        kinds, messages = zip(*cases(found, test))
        assert "failure" in kinds and "error" not in kinds, f"{test} does not notice that the rule is gone: {kinds}"
        broken = re.search(r"^(Name|Import|Syntax|Indentation|UnboundLocal)Error", "\n".join(messages), re.MULTILINE)
        assert not broken, f"the mutation is broken: {messages}"


@pytest.mark.parametrize("file", TABLE)
def test_every_mutation_finds_its_text(file: str) -> None:
    text = (PACKAGE / file).read_text(encoding="utf-8")
    for each in (each for each in MUTATIONS if each.file == file):
        assert text.count(each.old) == 1, f"{file}: '{each.old}' stands there {text.count(each.old)} times; mend the mutation '{each.rule}'"


def refusals(tree: ast.AST, conditions: tuple[int, int] | None = None) -> Iterator[set[int]]:
    """Of each place that refuses: its lines and those of the condition right around it."""
    for node in ast.iter_child_nodes(tree):
        inner = conditions
        if isinstance(node, ast.If | ast.ExceptHandler):
            inner = node.lineno, node.body[0].lineno - 1
        elif isinstance(node, ast.FunctionDef):
            inner = None
        refuses = (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)) or (
            isinstance(node, ast.Expr | ast.Assign | ast.AugAssign) and re.match(TELLS, ast.unparse(node)))
        if refuses:
            lines = set(range(node.lineno, (node.end_lineno or node.lineno) + 1))  # type: ignore[attr-defined]
            yield lines | (set(range(conditions[0], conditions[1] + 1)) if conditions else set())
        else:
            yield from refusals(node, inner)


@pytest.mark.parametrize("file", [file for file in TABLE if file not in ("flow/train.py", "runner.py")])
def test_every_refusal_has_a_mutation(file: str) -> None:
    """In the files that read; the two others hold rules of another kind."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    mutated = set()
    for each in (each for each in MUTATIONS if each.file == file):
        first = text[:text.index(each.old)].count("\n") + 1
        mutated |= set(range(first, first + each.old.count("\n") + 1))
    lines = text.splitlines()
    assert not [lines[min(places) - 1].strip() for places in refusals(ast.parse(text)) if not places & mutated]
