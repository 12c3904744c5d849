"""Checkpoint forms: every key of every form is used, explained or reported; nothing else is read as UMT."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tempme_vl.backbones.umt_checkpoint import Target, convert, detect_form, read_checkpoint

State = dict[str, Tensor]
WIDTH, TEXT_WIDTH = 6, 4


def linear(name: str, out_width: int, in_width: int) -> State:
    return {f"{name}.weight": torch.randn(out_width, in_width), f"{name}.bias": torch.randn(out_width)}


def norm(name: str, width: int) -> State:
    return {f"{name}.weight": torch.randn(width), f"{name}.bias": torch.randn(width)}


def vision(prefix: str, depth: int) -> State:
    state = {f"{prefix}patch_embed.proj.weight": torch.randn(WIDTH, 3, 1, 2, 2)}
    state[f"{prefix}patch_embed.proj.bias"] = torch.randn(WIDTH)
    for i in range(depth):
        block = f"{prefix}blocks.{i}."
        state |= {f"{block}attn.{bias}_bias": torch.randn(WIDTH) for bias in "qv"}
        state[f"{block}attn.qkv.weight"] = torch.randn(3 * WIDTH, WIDTH)
        state |= norm(f"{block}norm1", WIDTH) | norm(f"{block}norm2", WIDTH) | linear(f"{block}attn.proj", WIDTH, WIDTH)
        state |= linear(f"{block}mlp.fc1", 8, WIDTH) | linear(f"{block}mlp.fc2", WIDTH, 8)
    return state | norm(f"{prefix}norm", WIDTH)


def attention(name: str, source_width: int) -> State:
    state = linear(f"{name}.self.query", TEXT_WIDTH, TEXT_WIDTH)
    state |= linear(f"{name}.self.key", TEXT_WIDTH, source_width)
    state |= linear(f"{name}.self.value", TEXT_WIDTH, source_width)
    return state | linear(f"{name}.output.dense", TEXT_WIDTH, TEXT_WIDTH) | norm(f"{name}.output.LayerNorm", TEXT_WIDTH)


def bert(prefix: str, depth: int, fusion: int) -> State:
    embeddings = f"{prefix}embeddings."
    state = {f"{embeddings}position_ids": torch.arange(7)[None]} | norm(f"{embeddings}LayerNorm", TEXT_WIDTH)
    for name, count in (("word", 9), ("position", 7), ("token_type", 2)):
        state[f"{embeddings}{name}_embeddings.weight"] = torch.randn(count, TEXT_WIDTH)
    for i in range(depth):
        layer = f"{prefix}encoder.layer.{i}."
        state |= attention(f"{layer}attention", TEXT_WIDTH)
        if i >= fusion:
            state |= attention(f"{layer}crossattention", WIDTH)
        state |= linear(f"{layer}intermediate.dense", 8, TEXT_WIDTH) | linear(f"{layer}output.dense", TEXT_WIDTH, 8)
        state |= norm(f"{layer}output.LayerNorm", TEXT_WIDTH)
    return state


def language_head(prefix: str, word_embeddings: Tensor) -> State:
    head = f"{prefix}cls.predictions."
    bias = torch.randn(9)
    state = linear(f"{head}transform.dense", TEXT_WIDTH, TEXT_WIDTH) | norm(f"{head}transform.LayerNorm", TEXT_WIDTH)
    return state | {f"{head}bias": bias, f"{head}decoder.bias": bias, f"{head}decoder.weight": word_embeddings}


def contrastive() -> State:
    state = {"temp": torch.tensor(0.07)} | norm("vision_encoder.pool_norm", WIDTH) | linear("itm_head", 2, TEXT_WIDTH)
    return state | linear("vision_proj", 5, WIDTH) | linear("text_proj", 5, TEXT_WIDTH)


def clip_decoder(prefix: str) -> State:
    return {k: v for i in range(6) for k, v in linear(f"{prefix}clip_decoder.{i}.head", 3, WIDTH).items()} | {
        k: v for i in range(6) for k, v in norm(f"{prefix}clip_decoder.{i}.norm", 3).items()
    }


def pretraining(depth: int = 2, text_depth: int = 5, fusion: int = 3) -> State:
    state = vision("vision_encoder.encoder.", depth) | clip_decoder("vision_encoder.") | contrastive()
    state |= bert("text_encoder.bert.", text_depth, fusion)
    words = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    return state | language_head("text_encoder.", words)


def retrieval(depth: int = 2, text_depth: int = 5, fusion: int = 3) -> State:
    return vision("vision_encoder.encoder.", depth) | contrastive() | bert("text_encoder.", text_depth, fusion)


def qa(depth: int = 2, text_depth: int = 5, fusion: int = 3) -> State:
    state = vision("vision_encoder.encoder.", depth) | bert("text_encoder.", text_depth, fusion)
    state |= bert("text_decoder.bert.", text_depth - fusion, 0)
    return state | language_head("text_decoder.", state["text_decoder.bert.embeddings.word_embeddings.weight"])


def stage1(depth: int = 2) -> State:
    return vision("encoder.", depth) | clip_decoder("")


def without_positions(state: State) -> set[str]:
    return {key for key in state if not key.endswith("position_ids")}


FORMS = {"stage1": stage1, "pretraining": pretraining, "retrieval": retrieval, "qa": qa}


@pytest.mark.parametrize("form", FORMS)
def test_form_is_detected(form: str) -> None:
    assert detect_form(FORMS[form]()) == form


@pytest.mark.parametrize(
    ("depth", "text_depth", "fusion", "counts"),
    [(12, 12, 9, (428, 397, 479)), (24, 24, 19, (796, 765, 899))],
    ids=["B/16 with BERT base", "L/16 with BERT large"],
)
def test_released_sizes(depth: int, text_depth: int, fusion: int, counts: tuple[int, ...]) -> None:
    sizes = (depth, text_depth, fusion)
    files = pretraining(*sizes), retrieval(*sizes), qa(*sizes)
    assert tuple(map(len, files)) == counts  # the key counts of the released models
    targets: dict[Target, State] = {"retrieval": files[1], "qa": files[2]}
    for target, file in targets.items():
        converted = convert(files[0], target)
        assert set(converted.state) == without_positions(file)
        assert {k: v.shape for k, v in converted.state.items()} == {k: file[k].shape for k in converted.state}
        assert not converted.report.missing and not converted.report.unexplained


@pytest.mark.parametrize("target", ["retrieval", "qa", "vision"])
@pytest.mark.parametrize("form", FORMS)
def test_every_key_is_accounted_for(form: str, target: Target) -> None:
    state = FORMS[form]()
    converted = convert(state, target)
    report = converted.report
    assert (report.form, report.target) == (form, target)
    assert {*report.used, *report.unexpected} == set(state) and not {*report.used} & {*report.unexpected}
    assert set(report.explained) == set(report.unexpected) and not report.unexplained
    assert not {*converted.state} & {*report.missing}
    file_tensors = {id(tensor) for tensor in state.values()}
    assert all(id(tensor) in file_tensors for tensor in converted.state.values())  # no copies
    assert {id(state[key]) for key in report.used} == {id(tensor) for tensor in converted.state.values()}


@pytest.mark.parametrize("form", ["retrieval", "qa"])
def test_own_form_is_kept(form: Target) -> None:
    state = FORMS[form]()
    converted = convert(state, form)
    assert set(converted.state) == without_positions(state) and not converted.report.missing
    assert all(tensor is state[key] for key, tensor in converted.state.items())


def test_answer_decoder_starts_from_the_fusion_layers() -> None:
    state = pretraining()
    converted = convert(state, "qa", fusion_layer=3).state
    for key, tensor in converted.items():
        if key.startswith("text_decoder.bert.encoder.layer."):
            number, name = key.removeprefix("text_decoder.bert.encoder.layer.").split(".", 1)
            assert tensor is state[f"text_encoder.bert.encoder.layer.{int(number) + 3}.{name}"]
            assert tensor is converted[f"text_encoder.encoder.layer.{int(number) + 3}.{name}"]
    assert sum(key.endswith("crossattention.self.query.weight") for key in converted) == 2 * (5 - 3)


def test_tied_projection_may_be_left_out() -> None:
    state = pretraining()
    for part in ("weight", "bias"):
        del state[f"text_encoder.cls.predictions.decoder.{part}"]
    converted = convert(state, "qa")
    assert not converted.report.missing
    head = "text_decoder.cls.predictions."
    words = state["text_encoder.bert.embeddings.word_embeddings.weight"]
    assert converted.state[f"{head}decoder.weight"] is words
    assert converted.state[f"{head}decoder.bias"] is state["text_encoder.cls.predictions.bias"]


def test_vision_is_the_same_from_every_form() -> None:
    weights = vision("encoder.", 2)
    for form, build in FORMS.items():
        prefix = "" if form == "stage1" else "vision_encoder."
        converted = convert(build() | {prefix + key: value for key, value in weights.items()}, "vision")
        assert all(converted.state[key] is value for key, value in weights.items())
        pool_norm = {"pool_norm.weight", "pool_norm.bias"}
        assert set(converted.report.missing) == (pool_norm if form in ("stage1", "qa") else set())
        again = convert(converted.state, "vision")
        assert again.state.keys() == converted.state.keys() and again.report.form == "stage1"


def test_missing_parts_are_named() -> None:
    alone = convert(stage1(), "retrieval").report.missing
    assert {"text_encoder.*", "temp", "itm_head.weight", "vision_encoder.pool_norm.bias"} <= set(alone)
    assert {"text_decoder.bert.*", "text_decoder.cls.predictions.bias"} <= set(convert(stage1(), "qa").report.missing)
    assert "temp" in convert(qa(), "retrieval").report.missing
    assert "text_decoder.cls.predictions.transform.dense.weight" in convert(retrieval(), "qa").report.missing


@pytest.mark.parametrize(
    ("key", "missing"),
    [
        ("vision_encoder.encoder.blocks.1.attn.q_bias", ["vision_encoder.encoder.blocks.1.attn.q_bias"]),
        (
            "text_encoder.bert.encoder.layer.4.crossattention.self.key.bias",
            [
                "text_encoder.encoder.layer.4.crossattention.self.key.bias",
                "text_decoder.bert.encoder.layer.1.crossattention.self.key.bias",
            ],
        ),
    ],
)
def test_a_gap_is_reported(key: str, missing: list[str]) -> None:
    state = pretraining()
    del state[key]
    assert list(convert(state, "qa").report.missing) == missing


def test_a_gap_of_an_answer_decoder_is_not_filled_from_the_encoder() -> None:
    state = qa()
    key = "text_decoder.bert.encoder.layer.0.output.dense.weight"
    del state[key]
    assert convert(state, "qa").report.missing == (key,)


@pytest.mark.parametrize(
    "key",
    [
        "vision_encoder.encoder.pos_embed",
        "vision_encoder.encoder.blocks.0.attn.k_bias",
        "text_encoder.bert.pooler.dense.weight",
        "text_encoder.embeddings.word_embeddings.weight",  # a second one, beside the one under bert.
        "vision_proj.scale",
        "optimizer",
    ],
)
def test_unknown_keys_stay_unexplained(key: str) -> None:
    for target in ("retrieval", "qa"):
        report = convert(pretraining() | {key: torch.zeros(1)}, target).report
        if key.startswith("text_encoder.embeddings"):
            assert report.unexplained == (key.replace("text_encoder.", "text_encoder.bert."),)
        else:
            assert report.unexplained == (key,)
        assert "1 unexplained" in str(report)


def test_report_is_complete_and_short() -> None:
    state = pretraining() | {"x.y": torch.ones(1)}
    state |= {f"clip_teacher.layers.{i}.bias": torch.zeros(1) for i in (0, 1, 2, 5)}
    del state["temp"]
    text = str(convert(state, "retrieval").report)
    lines = text.splitlines()
    assert "pretraining form, converted to retrieval" in lines[0] and "1 missing" in lines[0]
    assert "unexpected, distillation teacher (4):" in lines and "  clip_teacher.layers.{0,1,2,5}.bias" in lines
    assert "unexpected, distillation decoder (24):" in lines
    assert "  vision_encoder.clip_decoder.{0-5}.head.weight" in lines
    assert lines[-4:] == ["unexpected, unexplained (1):", "  x.y", "missing (1):", "  temp"]


@pytest.mark.parametrize("given", [-1, 2, 4, 9])
def test_wrong_fusion_layer(given: int) -> None:
    with pytest.raises(ValueError, match=rf"expected fusion_layer=3.* got {given}"):
        convert(pretraining(), "qa", given)


def test_text_without_cross_attention_needs_a_fusion_layer() -> None:
    plain = pretraining(fusion=5)
    with pytest.raises(ValueError, match=r"none of the 5 text layers has cross-attention.*fusion_layer"):
        convert(plain, "retrieval")
    with pytest.raises(ValueError, match=r"between 0 and 4.*got 5"):
        convert(plain, "retrieval", 5)
    missing = convert(plain, "retrieval", 4).report.missing
    assert len(missing) == 10 and all(key.startswith("text_encoder.encoder.layer.4.crossattention.") for key in missing)


def test_unknown_target() -> None:
    with pytest.raises(ValueError, match="retrieval, qa, vision; got 'captioning'"):
        convert(pretraining(), "captioning")


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        (["visual.conv1.weight", "visual.transformer.resblocks.0.ln_1.weight", "text_projection"], "OpenAI CLIP"),
        (["clip.visual.conv1.weight"], "OpenAI CLIP"),
        (["visual.trunk.blocks.0.norm1.weight"], "timm or EVA"),
        (["vision_model.encoder.layers.0.mlp.fc1.bias", "text_model.final_layer_norm.bias"], "Hugging Face CLIP"),
        (["cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"], "timm ViT"),
        (["patch_embed.proj.weight", "blocks.0.attn.q_bias", "fc_norm.weight"], "action classifier"),
        (["encoder.blocks.0.attn.q_bias", "decoder.blocks.0.attn.q_bias", "mask_token"], "VideoMAE"),
        (["vision_encoder.blocks.0.ls1.gamma"], "InternVideo2"),
        (["visual_encoder.blocks.0.attn.qkv.weight", "text_decoder.bert.embeddings.LayerNorm.bias"], "BLIP"),
        (["embeddings.patch_embeddings.projection.weight", "encoder.layer.0.output.dense.bias"], "Hugging Face ViT"),
        (["bert.embeddings.word_embeddings.weight"], "BERT text model"),
        (["module.vision_encoder.encoder.blocks.0.norm1.bias"], "prefix 'module.'"),
        (["conv1.weight", "layer1.0.bn1.bias"], r"no family known here: conv1.weight, layer1.0.bn1.bias"),
    ],
)
def test_other_families_are_named(keys: list[str], family: str) -> None:
    state = {key: torch.zeros(1) for key in keys}
    with pytest.raises(ValueError, match=f"expected a UMT checkpoint.*{family}"):
        detect_form(state)
    with pytest.raises(ValueError, match=family):
        convert(state, "vision")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".safetensors"])
def test_files_come_back(tmp_path: Path, suffix: str) -> None:
    state = stage1()
    path = tmp_path / f"file{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    loaded = read_checkpoint(path)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", ["model", "module"])
def test_wrapped_state_is_found(tmp_path: Path, name: str, zipped: bool) -> None:
    state = stage1()
    torch.save({name: state, "epoch": 3}, tmp_path / "file.pth", _use_new_zipfile_serialization=zipped)
    loaded = read_checkpoint(str(tmp_path / "file.pth"))
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.pth does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    with pytest.raises(ValueError, match="is a folder"):
        read_checkpoint(tmp_path)


class Code:
    """Leaves a file behind if its pickle is run."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_unsafe_pickle_is_not_run(tmp_path: Path) -> None:
    message = r"could run code.*If you trust the file.*\.safetensors.*Unsupported global"
    for unsafe in (Code(tmp_path / "ran"), argparse.Namespace(lr=1e-4)):
        torch.save({"model": stage1(), "args": unsafe}, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=message):
            read_checkpoint(tmp_path / "file.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(2),
        [torch.zeros(2)],
        {},
        {0: torch.zeros(2)},
        {"model": {"a": 1}},
        {"state": {"a": torch.zeros(1)}, "epoch": 3},
    ],
)
def test_no_state_dict(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"expected a state dict.*; got"):
        read_checkpoint(tmp_path / "file.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("kept", [0, 5, 3000])
def test_damaged_file(tmp_path: Path, suffix: str, kept: int) -> None:
    path = tmp_path / f"file{suffix}"
    if suffix == ".safetensors":
        save_file(stage1(), path)
    else:
        torch.save(stage1(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"file\{suffix} (cannot be read|is not a pickle)"):
        read_checkpoint(path)
