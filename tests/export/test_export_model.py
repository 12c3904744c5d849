"""What is written for other runtimes gives what torch gives, and what cannot be written is refused with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import Tensor
from towers import TINY, every_way, random_video, small_clip

from tempme_vl import MergeSchedule, VisualFrontend, __version__, cli, create_frontend, create_retrieval_model
from tempme_vl.backbones import hf
from tempme_vl.backbones import timm as timm_family
from tempme_vl.backbones.open_clip_blocks import visual_backbone
from tempme_vl.export import exporting
from tempme_vl.export.exporting import FORMATS, differences, export_model
from tempme_vl.export.onnx import ExportError, Runner, to_onnx
from tempme_vl.export.options import EXPORT
from tempme_vl.export.sides import Side, VideoSide, fingerprint
from tempme_vl.frontend import merge_in
from tempme_vl.tasks.retrieval import RetrievalModel

for package in ("onnxscript", "onnxruntime", "openvino"):
    pytest.importorskip(package)
FRAMES = 2
CLUSTERING = {"centerclip": r"runs tempme_vl\.kmedoids, .*choose a method without clustering"}


def small(schedule: MergeSchedule) -> VisualFrontend:
    """Two blocks, whose weights all matter."""
    frontend = VisualFrontend(visual_backbone(small_clip(layers=2).visual), schedule).eval()
    with torch.no_grad():
        for parameter in frontend.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return frontend


def assert_as_in_torch(frontend: VisualFrontend, folder: Path, batch: int | None = 2) -> None:
    """Both formats, on a video that no export has seen."""
    graph = to_onnx(VideoSide(frontend).eval(), batch)
    for videos in (2,) if batch else (1, 2, 3):
        video = random_video(frontend.schedule.frames, frontend.shape.image_size, videos)
        with torch.no_grad():
            expected = frontend(video)
        for name, way in FORMATS.items():
            file = folder / f"{name}{way.suffix}"
            way.write(graph, "{}", file)
            made = way.load(file)({"pixels": video.numpy()})
            for field in ("tokens", "size", "pooled"):
                value = torch.from_numpy(made[field])
                torch.testing.assert_close(value, getattr(expected, field), rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(schedule, id=schedule.method, marks=() if schedule.method in CLUSTERING else pytest.mark.slow)
        for schedule in every_way(layers=2, frames=FRAMES, others=False)
    ],
)
def test_every_method_is_written_or_refused(schedule: MergeSchedule, tmp_path: Path) -> None:
    frontend = small(schedule)
    if schedule.method in CLUSTERING:
        with pytest.raises(ExportError, match=CLUSTERING[schedule.method]):
            export_model(frontend, tmp_path / "a.onnx")
        assert not list(tmp_path.iterdir())
    else:
        assert_as_in_torch(frontend, tmp_path)


@pytest.mark.slow
def test_a_join_and_merges_inside(tmp_path: Path) -> None:
    assert_as_in_torch(small(MergeSchedule.tempme(2, FRAMES, 17, 2, (1,), (2,), 40, 20)), tmp_path)


@pytest.mark.parametrize(
    "method", ["pool", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tempme", "testa"))]
)
def test_any_number_of_videos(method: str, tmp_path: Path) -> None:
    schedule = next(one for one in every_way(2, FRAMES, others=False) if one.method == method)
    assert_as_in_torch(small(schedule), tmp_path, batch=None)


def of_name(name: str, method: str, **options: Any) -> VisualFrontend:
    return create_frontend(name, method=method, num_frames=FRAMES, **options)


def of_timm() -> VisualFrontend:
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 8}
    tower = timm.create_model("vit_tiny_patch16_224", **shape, reg_tokens=4)
    return merge_in(*timm_family.backbone_of(tower), "tempme", FRAMES, 0.1, budget=0.7)


def of_transformers(pooled_by_attention: bool) -> VisualFrontend:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"image_size": 32, "patch_size": 8}
    if pooled_by_attention:
        tower: Any = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**shape))
    else:
        config = transformers.CLIPVisionConfig(**shape, projection_dim=16)
        tower = transformers.CLIPVisionModelWithProjection(config)
    return merge_in(*hf.backbone_of(tower), "tome", FRAMES, 0.0, r=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: of_name("umt:tiny", "tempme", budget=0.7), id="umt"),
        pytest.param(lambda: of_name("umt:tiny", "tome", mode="joint", r=7), id="umt joint"),
        pytest.param(of_timm, id="timm"),
        pytest.param(lambda: of_transformers(False), id="hf CLIP"),
        pytest.param(lambda: of_transformers(True), id="hf SigLIP"),
    ],
)
def test_towers_of_other_families(make: Callable[[], VisualFrontend], tmp_path: Path) -> None:
    torch.manual_seed(0)
    assert_as_in_torch(make().eval(), tmp_path)


@pytest.mark.slow
def test_one_token_alone_is_refused_where_openvino_computes_something_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    frontend = of_name("umt:tiny", "tome", mode="joint", r=9).eval()
    assert frontend.schedule.output_tokens == 1
    with pytest.raises(ExportError, match="largest value"):
        export_model(frontend, tmp_path / "one.xml", "openvino")
    assert not list(tmp_path.iterdir())
    export_model(frontend, tmp_path / "one.onnx", "onnx")


class Sorts(Side):
    """Orders of whole numbers, many of them equal."""

    name, inputs, embedding = "video", ("numbers",), "ascending"

    def example(self, batch: int, seed: int) -> tuple[Tensor, ...]:
        return (torch.randint(9, (batch, 60), generator=torch.Generator().manual_seed(seed)).float(),)

    def forward(self, numbers: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.named(numbers).values())

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        (numbers,) = inputs
        return {
            "ascending": numbers.argsort(dim=-1, stable=True),
            "descending": numbers.argsort(dim=-1, descending=True, stable=True),
            "first": numbers.sort(dim=0, stable=True).values,
            "largest": numbers.max(dim=-1).indices,
            "argmax": numbers.argmax(-1),
        }

    def facts(self) -> dict[str, Any]:
        return {}


def test_equal_values_keep_their_order(tmp_path: Path) -> None:
    frontend = create_frontend(TINY, method="none", num_frames=1)
    sorts = Sorts(frontend).eval()
    graph = to_onnx(sorts, 4)
    for name, way in FORMATS.items():
        way.write(graph, "{}", tmp_path / f"a{way.suffix}")
        for seed in range(3):
            (numbers,) = sorts.example(4, seed)
            made = way.load(tmp_path / f"a{way.suffix}")({"numbers": numbers.numpy()})
            for output, value in sorts.named(numbers).items():
                assert np.array_equal(made[output], value.numpy()), (name, output)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    create_retrieval_model(TINY, method="none", num_frames=FRAMES).save_pretrained(folder)
    return folder


def test_the_command_writes_a_file_that_says_what_it_is(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import openvino

    file, model = tmp_path / "new" / "video.xml", RetrievalModel.from_pretrained(saved).eval()
    cli.main(["export", str(saved), "--format", "openvino", "--out", str(file)])
    shown = capsys.readouterr().out
    assert "pixels (1, 2, 3, 32, 32)" in shown and "video (1, 64)" in shown and "largest difference from torch" in shown
    assert sorted(path.name for path in file.parent.iterdir()) == ["video.bin", "video.xml"]
    video = random_video(FRAMES, videos=1)
    made = FORMATS["openvino"].load(file)({"pixels": video.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(made["video"]), model.encode_video(video), rtol=0, atol=1e-5)
    said = json.loads(openvino.Core().read_model(file).get_rt_info("tempme_vl").value)
    assert said["embedding"] == "video" and said["shapes"]["tokens"] == [1, 34, 64]
    assert MergeSchedule.from_dict(said["schedule"], "a file") == model.frontend.schedule
    mean = model.frontend.preprocessing.mean
    assert said["preprocess"]["mean"] == list(mean) and said["preprocess"]["resize"] == "shortest"
    assert said["weights_sha256"] == fingerprint(VideoSide(model)) and said["versions"]["tempme_vl"] == __version__


def test_any_number_of_texts(saved: Path, tmp_path: Path) -> None:
    import onnxruntime

    model = RetrievalModel.from_pretrained(saved).eval()
    told = export_model(model, tmp_path / "text.onnx", part="text", batch_size=None)
    words = model.input.max_words
    assert told.shapes == {"text_ids": ("batch", words), "text_mask": ("batch", words), "text": ("batch", 64)}
    assert set(told.differences) == {"text"} and 0 < told.differences["text"] < 1e-5
    tokenize = model.words.tokenizer(words)
    ids, mask = (torch.stack(parts) for parts in zip(*map(tokenize, ["a dog", "two red balls fall", ""]), strict=True))
    made = FORMATS["onnx"].load(told.file)({"text_ids": ids.numpy(), "text_mask": mask.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(made["text"]), model.encode_text(ids, mask), rtol=0, atol=1e-5)
    about = onnxruntime.InferenceSession(told.file).get_modelmeta().custom_metadata_map["tempme_vl"]
    assert json.loads(about)["max_words"] == words and json.loads(about)["batch_size"] is None


def test_the_fingerprint_is_of_all_weights() -> None:
    frontend = create_frontend(TINY, method="none", num_frames=1)
    before = fingerprint(frontend)
    assert fingerprint(frontend) == before
    with torch.no_grad():
        next(iter(frontend.norm.parameters()))[3] += 1e-6
    assert fingerprint(frontend) != before


def test_a_file_with_other_outputs_does_not_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.onnx"
    file.write_text("an older one")

    def off(path: Path) -> Runner:
        load = FORMATS["onnx"].load(path)
        return lambda inputs: {name: value * 1.001 for name, value in load(inputs).items()}

    monkeypatch.setattr(exporting, "FORMATS", {"onnx": replace(FORMATS["onnx"], load=off)})
    said = r"makes other outputs of the video side of .*'tokens': 0\.00[01].*at most 0\.0001"
    with pytest.raises(ExportError, match=said):
        export_model(create_frontend(TINY, method="none", num_frames=1), file)
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"] and file.read_text() == "an older one"


class Jumps(Side):
    """1, and of some draws 2 in float32 and 1 in float64."""

    name, inputs, embedding = "video", ("draw",), "y"

    def example(self, batch: int, seed: int) -> tuple[Tensor, ...]:
        return (torch.full((batch,), float(seed)),)

    def named(self, *inputs: Tensor) -> dict[str, Tensor]:
        (draw,) = inputs
        tenth = torch.full_like(draw, 0.1).double() > 0.1
        return {"y": torch.ones_like(draw) + (tenth & (draw <= self.last))}

    def facts(self) -> dict[str, Any]:
        return {}

    last = 0


@pytest.mark.parametrize(("last", "found"), [(0, 0.0), (1, 0.0), (3, 0.0), (5, 0.5)])
def test_draws_that_hang_on_rounding_say_nothing(last: int, found: float) -> None:
    side = Jumps(create_frontend(TINY, method="none", num_frames=1))
    side.last = last
    assert differences(side, lambda inputs: {"y": np.ones_like(inputs["draw"])}, 2) == {"y": found}
    off = differences(side, lambda inputs: {"y": 1.01 * np.ones_like(inputs["draw"])}, 2)
    assert off["y"] >= 0.0099


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"file": "a.xml"}, r"a file of onnx ends in \.onnx; got .*a\.xml"),
        ({"file": "a.onnx", "format": "tflite"}, "expected a format among onnx, openvino; got 'tflite'"),
        ({"file": "a.onnx", "part": "text"}, "a front end has no texts"),
        ({"file": "a.onnx", "part": "sound"}, "expected the part 'video' or 'text'; got 'sound'"),
        ({"file": "a.onnx", "batch_size": 0}, "--batch-size must be 1 or more; got 0"),
    ],
)
def test_what_cannot_be_meant_is_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    given = {**given, "file": tmp_path / given["file"]}
    with pytest.raises(ValueError, match=said):
        export_model(create_frontend(TINY, method="none", num_frames=1), **given)
    assert not list(tmp_path.iterdir())


def test_what_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name.startswith("onnxs") else object())
    with pytest.raises(ExportError, match=r"onnx needs onnxscript: pip install 'tempme_vl\[export\]'"):
        export_model("no folder", tmp_path / "a.onnx")


def test_options_of_the_command() -> None:
    options = EXPORT.parse(["a", "--format", "onnx", "--out", "b.onnx", "--batch-size", "None"])
    assert (options.part, options.batch_size, options.out) == ("video", None, Path("b.onnx"))
