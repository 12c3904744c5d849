"""What the package uses of other libraries that they do not document is listed, and nothing else is.

Run as a program, this file writes docs/libraries.md.
"""

from __future__ import annotations

import ast
import re
import sys
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from torch import Tensor, nn

from tempme_vl import libraries
from tempme_vl.libraries import LIBRARIES, LibraryChangedError, undocumented

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "libraries.md"
FILES = {str(path.relative_to(ROOT / "tempme_vl")): path for path in sorted((ROOT / "tempme_vl").rglob("*.py"))}
IMPORTED_AS = {"open_clip_torch": "open_clip", "lmms-eval": "lmms_eval"}

# Modules that the libraries' own documentation names, and all of the libraries that are not here.
DOCUMENTED_MODULES = {
    "open_clip": {"open_clip"},
    "timm": {"timm", "timm.data", "timm.layers", "timm.models"},
    "transformers": {"transformers", "transformers.modeling_outputs"},
    "deepspeed": {"deepspeed", "deepspeed.accelerator", "deepspeed.utils"},
    "peft": {"peft"},
    "lmms_eval": set(),
    "decord": {"decord"},
    "av": {"av", "av.filter", "av.video.reformatter"},
    "einops": {"einops"},
}
# Where objects of other libraries are taken apart; elsewhere names with an underscore in front are looked for alone.
SURVEYED = ("backbones/", "integrations/", "lmms_eval/", "tasks/", "text/")
# Attributes that libraries document; fields of a configuration are, too.
_DOCUMENTED = """
last_hidden_state normalized_shape eps reset_parameters
    activation_checkpointing_enable add_scalar apply_chat_template architectures attention_dropout
    attention_probs_dropout_prob batch_decode bos_token bos_token_id chat_template config_class convert_ids_to_tokens
    convert_tokens_to_ids decode depth dilation embed_dim eos_token_id fullatt_block_indexes generation_config
    get_base_model get_global_grad_norm get_image_features get_input_embeddings get_lr get_output_embeddings
    get_text_config get_video_features image_mean image_std eos_token hidden_size in_channels in_features kernel_size
    logits max_image_size
    max_position_embeddings mlp_ratio ndim normalize_str normalizer num_classes num_heads num_processes
    num_register_tokens out_channels out_features p
    pad_token_id padding padding_idx padding_side patch_embed peft_config pooler_output post_processor pre_tokenize_str
    pre_tokenizer pretrained_cfg process_index projection_dim temporal_patch_size to_json_string training
    execution_device image_token post_forward pre_forward save_for_backward saved_tensors sequences
    use_mean_pooling video_token window_size zero_optimization_stage
    info warning PeftModel match fullmatch hf_hub_id hf_hub_filename
"""
KNOWN = set(_DOCUMENTED.split()).union(
    *(
        dir(kind)
        for kind in (Tensor, nn.Module, nn.Parameter, np.ndarray, str, int, dict, list, set, Path, OSError, type)
    )
)


_PLAIN = {*dir(type), "__cause__", "__file__", "__version__", "_exit"}  # the last is in the documentation of os


@lru_cache
def defined() -> frozenset[str]:
    """Names that the package itself gives to functions, classes, fields and attributes."""
    names = set()
    for path in FILES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            if isinstance(node, ast.ClassDef):
                targets = [target for part in node.body if isinstance(part, ast.Assign) for target in part.targets]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _root(node) == "self":
                names.add(node.attr)
    return frozenset(names)


def _root(node: ast.expr) -> str:
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def attributes(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """Each attribute with what it is asked of and the name in front of that; getattr and hasattr too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr, ast.unparse(node.value), _root(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            of, name = node.args[:2]
            if isinstance(name, ast.Constant):
                yield name.value, ast.unparse(of), _root(of)


def undocumented_names(file: str, text: str, own: frozenset[str]) -> set[str]:
    """Imports and attributes of a file that neither the package nor a library's documentation knows."""
    tree, found, modules = ast.parse(text), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            pairs = [(alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules |= {alias.asname or alias.name for alias in node.names}
            pairs = [(str(node.module), f"{node.module}.{alias.name}") for alias in node.names]
        else:
            continue
        for module, name in pairs:
            documented = DOCUMENTED_MODULES.get(module.split(".")[0], {module})
            if module not in documented or any(
                part.startswith("_") for part in name.split(".") if part not in ("__future__", "__version__")
            ):
                found.add(name)
    for name, of, root in attributes(tree):
        if name.startswith("_"):
            ours = of in ("self", "cls") or (name in own and not of.startswith("super()"))
            if not ours and name not in _PLAIN:
                found.add(name)
        elif file.startswith(SURVEYED) and name not in KNOWN | own and root not in modules and "config" not in of:
            found.add(name)
    return found


def listed(file: str) -> set[str]:
    return {name for library in LIBRARIES.values() for use in library.uses if use.file == file for name in use.names}


def test_what_is_not_documented_is_listed() -> None:
    missing = {
        file: undocumented_names(file, path.read_text(), defined()) - listed(file) for file, path in FILES.items()
    }
    assert not {file: names for file, names in missing.items() if names}, (
        "add these names to tempme_vl/libraries.py, or to DOCUMENTED here if the library documents them"
    )


def test_what_is_listed_is_used() -> None:
    unused = {}
    for file in {use.file for library in LIBRARIES.values() for use in library.uses}:
        tree = ast.parse(FILES[file].read_text())
        there = {name for name, _, _ in attributes(tree)} | {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        there |= {f"{n.module}.{a.name}" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for a in n.names}
        unused[file] = listed(file) - there
    assert not {file: names for file, names in unused.items() if names}


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from timm.models.swin_transformer import SwinBlock", {"timm.models.swin_transformer.SwinBlock"}),
        ("import timm.models.vision_transformer", {"timm.models.vision_transformer"}),
        ("from torch._dynamo import config", {"torch._dynamo.config"}),
        ("from timm.layers import PatchEmbed", set()),
        ("tower.rotary_table", {"rotary_table"}),
        ("getattr(tower, 'rotary_table', None)", {"rotary_table"}),
        ("tower.config.rotary_table + tower.forward(x).mean()", set()),
        ("tower._cache", {"_cache"}),
        ("import torch\ntorch._C._cuda_init()", {"_C", "_cuda_init"}),
    ],
)
def test_the_survey_sees(code: str, found: set[str]) -> None:
    assert undocumented_names("backbones/new.py", code, defined()) == found


def requirements() -> dict[str, Requirement]:
    text = (ROOT / "pyproject.toml").read_text()  # no tomllib before Python 3.11
    (own,) = re.findall(r"^dependencies = \[\n(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
    (harness,) = re.findall(r"^lmms-eval = \[(.*)\]", text, flags=re.MULTILINE)
    return {requirement.name: requirement for requirement in map(Requirement, re.findall(r'"([^"]+)"', own + harness))}


@pytest.mark.parametrize("package", LIBRARIES)
def test_tested_versions_are_those_that_pip_may_install(package: str) -> None:
    """From the lowest that pyproject.toml allows, and the exact ones of constraints.txt among them."""
    library, wanted = LIBRARIES[package], requirements().get(package)
    for lowest in [s.version for s in wanted.specifier if s.operator == ">="] if wanted else []:  # else another's
        assert libraries._numbers(library.lowest) == libraries._numbers(lowest)
    locked = re.findall(rf"^{re.escape(package)}==([^ ;]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE)
    for version in locked:
        assert libraries._numbers(library.lowest) <= libraries._numbers(version) <= libraries._numbers(library.highest)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Versions that a test says are installed."""
    versions: dict[str, str] = {}
    monkeypatch.setattr(libraries, "_installed", versions.get)
    libraries.check.cache_clear()
    yield versions
    libraries.check.cache_clear()


@pytest.mark.parametrize("version", ["1.0.16", "0.9", "1.0.32", "2.0.0.dev0"])
def test_another_version_is_warned_of_once(version: str, installed: dict[str, str]) -> None:
    installed["timm"] = version
    tested = f"{LIBRARIES['timm'].lowest} to {LIBRARIES['timm'].highest}"
    with pytest.warns(UserWarning, match=rf"timm {version}, tested with {tested}\. .*pip install 'timm>=") as seen:
        for _ in range(3):
            with undocumented("timm"):
                pass
    assert len(seen) == 1


@pytest.mark.parametrize("version", [LIBRARIES["timm"].lowest, LIBRARIES["timm"].highest, ""])
def test_a_tested_version_or_an_unknown_one_is_not_warned_of(version: str, installed: dict[str, str]) -> None:
    installed["timm"] = version
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with undocumented("timm"):
            pass


def test_a_missing_part_says_what_to_do() -> None:
    """As a class, as an attribute of a tower, and in a host."""
    expected = (
        r"part of timm missing or changed: .*(Swirl|no_embed_class).*timm [\d.]+, tested with .*pip install 'timm>="
    )
    with pytest.raises(LibraryChangedError, match=expected), undocumented("timm"):
        from timm.models.vision_transformer import Swirl  # noqa: F401

    import timm

    from tempme_vl.backbones.timm import backbone_of

    tower = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    del tower.no_embed_class
    with pytest.raises(LibraryChangedError, match=expected):
        backbone_of(tower)


def test_a_changed_tower_of_open_clip_says_what_to_do() -> None:
    from towers import small_clip

    from tempme_vl.backbones.open_clip_blocks import visual_backbone

    visual = small_clip().visual
    del visual.pool_type
    expected = r"open_clip_torch missing or changed: .*pool_type.*open_clip_torch [\d.]+, tested with "
    with pytest.raises(LibraryChangedError, match=expected):
        visual_backbone(visual)


def page() -> str:
    """docs/libraries.md."""
    lines = [
        "# Other libraries",
        "",
        "What the package uses of other libraries that they do not document, by file (`tempme_vl/libraries.py`).",
        "Outside the tested versions a warning says so once; where a part is missing, an error names it, the installed",
        "version and the tested ones. Of decord, PyAV, einops and huggingface_hub only documented parts are used.",
        "",
    ]
    for package, library in LIBRARIES.items():
        lines += [f"## {package}, tested with {library.lowest} to {library.highest}", "", "| file | names | why |"]
        lines += ["| --- | --- | --- |"]
        for use in library.uses:
            lines.append(f"| {use.file} | {', '.join(f'`{name}`' for name in use.names)} | {use.why} |")
        lines.append("")
    return "\n".join(lines)


def test_the_page_shows_the_list() -> None:
    assert PAGE.read_text() == page(), f"write it anew: {sys.executable} tests/test_libraries.py"


if __name__ == "__main__":
    PAGE.write_text(page())
