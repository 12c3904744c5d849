"""The plug-in for lmms-eval, without lmms-eval: stand-ins for the four names that it takes from there."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from integrations import tiny, tiny_post
from PIL import Image
from safetensors.torch import load_file, save_file

from tempme_vl.data.rendered import write_video
from tempme_vl.data.video import read_frames
from tempme_vl.integrations import Compressed, compress
from tempme_vl.lmms_eval.arguments import cut, generation_options, video_of

QUESTIONS = ("what is the dog doing ?", "how many", "why is the red car in this video and what is that ?")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<' + part['type'] + '> ' }}{% endfor %}{% endfor %} ?"
)
SCHEDULE = tiny.schedule("tempme", 3)
HARNESS = ("lmms_eval", "lmms_eval.api", "lmms_eval.api.model", "lmms_eval.api.instance", "lmms_eval.models")


class Model:
    """The base class of models, as far as the plug-in relies on it."""

    def __init__(self) -> None:
        self._rank, self._world_size, self.task_dict = 0, 1, {}

    @property
    def rank(self) -> int:
        return self._rank

    def clean(self) -> None:
        pass


@dataclass(frozen=True)
class Result:
    text: Any


@dataclass(frozen=True)
class Manifest:
    model_id: str
    simple_class_path: str


@pytest.fixture(scope="module")
def tempme() -> Iterator[Any]:
    """The class that the entry point of pyproject.toml leads to."""
    with pytest.MonkeyPatch.context() as patch:
        for name in (*HARNESS, "lmms_eval.models.registry_v2"):
            patch.setitem(sys.modules, name, ModuleType(name))
        patch.setattr(sys.modules["lmms_eval.api.model"], "lmms", Model, raising=False)
        patch.setattr(sys.modules["lmms_eval.api.instance"], "GenerationResult", Result, raising=False)
        patch.setattr(sys.modules["lmms_eval.models.registry_v2"], "ModelManifest", Manifest, raising=False)
        project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
        group = project.split('[project.entry-points."lmms_eval.models"]\n')[1].split("\n\n")[0]
        name, value = (part.strip(' "') for part in group.split("="))
        manifest = EntryPoint(name, value, "lmms_eval.models").load()()
        assert manifest.model_id == name == "tempme_vl"
        module, _, class_name = manifest.simple_class_path.rpartition(".")
        yield getattr(importlib.import_module(module), class_name)
        del sys.modules[module]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host model, itself compressed, and three videos."""
    root = tmp_path_factory.mktemp("lmms")
    for number in range(3):
        write_video(root / f"{number}.mp4", tiny.video(number, frames=8 + 4 * number))
    model, processor = tiny.build("VideoLlava")
    model.save_pretrained(root / "host")
    processor.save_pretrained(root / "host")
    processor.chat_template = TEMPLATE
    compress(model, processor, num_frames=tiny.FRAMES, **SCHEDULE).save_pretrained(root / "compressed")
    return root


@pytest.fixture(scope="module")
def lm(tempme: Any, folder: Path) -> Any:
    return asked(tempme(str(folder / "compressed"), batch_size="2", device="cpu"), folder)


def asked(lm: Any, folder: Path) -> Any:
    """The model in the state that the harness asks it in: it knows the documents of the task "t"."""
    documents = [{"videos": [str(folder / f"{n % 3}.mp4")], "answer": "dog"} for n in range(5)]
    documents.append({"videos": documents[0]["videos"] + documents[1]["videos"], "answer": "dog"})
    lm.task_dict["t"] = {"test": documents}
    return lm


def request(context: str, argument: Any, document: int) -> Any:
    return SimpleNamespace(args=(context, argument, lambda doc: doc["videos"], document, "t", "test"))


def alone(compressed: Compressed, folder: Path, prompt: str, *numbers: int) -> dict[str, Any]:
    frames = [read_frames(folder / f"{n}.mp4", compressed.host.num_frames, sampling="uniform").pixels for n in numbers]
    return compressed.prepare(prompt, [frames])


def test_batches_give_the_answers_of_single_calls_in_order(lm: Any, folder: Path) -> None:
    settings = [{"max_new_tokens": 5, "until": ["\n\n"]}, {"max_new_tokens": 3, "temperature": 0.0, "num_beams": 2}]
    answers = lm.generate_until([request(QUESTIONS[n % 3], dict(settings[n % 2]), n) for n in range(5)])
    for number, answer in enumerate(answers):
        inputs = alone(lm.compressed, folder, f"<video> {QUESTIONS[number % 3]} ?", number % 3)
        options = {"max_new_tokens": 3, "num_beams": 2} if number % 2 else {"max_new_tokens": 5}
        with torch.no_grad():
            ids = lm.compressed.generate(**inputs, do_sample=False, **options)
        assert answer == lm.compressed.tokenizer.decode(ids[0], skip_special_tokens=True)
        assert len(answer.split()) == (3 if number % 2 else 5)
    assert len(set(answers)) > 2
    word = answers[0].split()[2]
    [begun] = lm.generate_until([request(QUESTIONS[0], {"max_new_tokens": 5, "until": word}, 0)])
    assert begun == answers[0].split(word)[0]


def test_losses_are_those_of_the_continuation_alone(lm: Any, folder: Path) -> None:
    prompt = f"<video> {QUESTIONS[0]} ?"
    with torch.no_grad():
        logits = lm.compressed(**alone(lm.compressed, folder, prompt, 1)).logits[0, -1]
    likeliest = lm.compressed.tokenizer.convert_ids_to_tokens(int(logits.argmax()))
    continuations = [f" {likeliest}", " dog", " red dog sleeps", " car"]
    results = [r.text for r in lm.loglikelihood([request(QUESTIONS[0], c, 1) for c in continuations])]
    assert [flag for _, flag in results] == [True, likeliest == "dog", False, likeliest == "car"]
    assert results[0][0] == min(loss for loss, _ in results)
    for continuation, (loss, _) in zip(continuations, results, strict=True):
        words = continuation.split()
        with torch.no_grad():
            logits = lm.compressed(**alone(lm.compressed, folder, f"{prompt}{continuation}", 1)).logits[0]
        losses = -logits.log_softmax(-1)[-len(words) - 1 : -1]
        expected = [losses[i, tiny.TOKEN[word]].item() for i, word in enumerate(words)]
        assert loss == pytest.approx(sum(expected) / len(expected), abs=1e-4)


def test_a_continuation_may_come_of_the_document_or_without_a_video(lm: Any) -> None:
    [given] = lm.loglikelihood([request("how many", " dog", 0)])
    assert lm.loglikelihood([request("how many", lambda doc: f" {doc['answer']}", 0)]) == [given]
    unconditional = lm.loglikelihood([SimpleNamespace(args=("", " dog"))])[0]
    assert unconditional.text[0] != given.text[0]
    with pytest.raises(ValueError, match="a token at least"):
        lm.loglikelihood([request("how many", "", 0)])


def test_prompts_hold_a_place_for_every_video_and_one_start(lm: Any) -> None:
    assert lm._prompt("how many", ["a.mp4", "b.mp4"]) == "<video> <video> how many ?"  # the tokenizer writes <s> itself
    given = "in <video> and <video> how many"
    assert lm._prompt(given, ["a.mp4", "b.mp4"]) == f"{given} ?"
    two = lm.generate_until([request("how many", {"max_new_tokens": 2}, 5)])
    with pytest.raises(ValueError, match="expected one video for every"):
        lm.generate_until([request("in <video> how many", {"max_new_tokens": 2}, 5)])
    assert len(two[0].split()) == 2


def test_a_host_is_compressed_by_the_options_of_the_command_line(tempme: Any, lm: Any, folder: Path) -> None:
    options = {"num_frames": 4, **SCHEDULE, "merge_layers": "1/2", "merge_frames": "2/2"}
    other = asked(tempme(str(folder / "host"), 3, "cpu", prompt="{video} {text} ?", **options), folder)
    assert other.compressed.host.config() == lm.compressed.host.config()
    requests = [request(QUESTIONS[n], {"max_new_tokens": 4}, n) for n in range(3)]
    assert other.generate_until(requests) == lm.generate_until(requests)
    single = {**options, "merge_layers": 2, "merge_frames": 2}
    assert tempme(str(folder / "host"), device="cpu", prompt="{video}", **single).compressed.host.num_frames == 4
    with pytest.raises(ValueError, match="no chat template"):
        tempme(str(folder / "host"), device="cpu", **options)
    with pytest.raises(ValueError, match=r"compressed already by its tempme\.json: leave out \['r'\]"):
        tempme(str(folder / "compressed"), device="cpu", r=2)
    other.clean()
    assert not hasattr(other, "compressed")


@pytest.mark.parametrize(
    ("where", "ways"), [("tower", {"budget": 0.5}), ("behind", {"budget": 0.5}), ("behind", {"tokens": 20})]
)
def test_place_and_limit_are_those_of_compress(where: Any, ways: dict[str, Any], tempme: Any, folder: Path) -> None:
    given = {"method": "tempme", "num_frames": tiny.FRAMES, "where": where, **ways}
    ours = tempme(str(folder / "host"), device="cpu", prompt="{video} {text} ?", **given)
    model, processor = tiny.build("VideoLlava")
    expected = compress(model, processor, **given)
    assert ours.compressed.host.config() == expected.host.config()
    native, left = ours.compressed.counts()
    assert left is not None and left <= ways.get("tokens", native / 2)


def test_a_host_is_read_whole_and_only_one_that_can_be_compressed(tempme: Any, folder: Path, tmp_path: Path) -> None:
    for file in (folder / "host").iterdir():
        shutil.copy(file, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if "lm_head" in name)
    save_file(
        {k: v for k, v in weights.items() if k != gone}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"lacks 1 weights of a VideoLlavaForConditionalGeneration: .*lm_head"):
        tempme(str(tmp_path), device="cpu", prompt="{video} {text} ?", method="none")
    config = json.loads((tmp_path / "config.json").read_text())
    for names, said in ((["LlamaForCausalLM"], "LlamaForCausalLM"), (None, "a model without architectures")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": names}))
        (tmp_path / "model.safetensors").unlink(missing_ok=True)  # refused before it is looked for
        with pytest.raises(ValueError, match=f"{said} is no video-language model that can be compressed; known are V"):
            tempme(str(tmp_path), device="cpu", prompt="{video} {text} ?", method="none")


@pytest.mark.skipif(not tiny_post.PLACED, reason="compress refuses this host with this transformers")
def test_frames_know_their_times(tempme: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = tiny_post.build("Qwen2.5-VL")
    compressed = compress(model, processor, "none", num_frames=4)
    monkeypatch.setattr(sys.modules[tempme.__module__], "load", lambda *_: compressed)
    place = tiny_post.placeholder("Qwen2.5-VL")
    lm = asked(tempme("qwen", 4, "cpu", prompt="{text}"), folder)
    seen: list[Any] = []
    encode = compressed.host.encode

    def noted(videos: Any, prompts: Any) -> Any:
        seen.extend((video.indices, video.fps, video.times) for video in videos)
        return encode(videos, prompts)

    monkeypatch.setattr(compressed.host, "encode", noted)
    requests = [request(f"how many {place}", {"max_new_tokens": 2}, n) for n in range(3)]
    requests.append(request(f"how many {place} {place}", {"max_new_tokens": 2}, 5))
    assert all(0 < len(answer) <= 2 for answer in lm.generate_until(requests))  # letters
    videos = [read_frames(folder / f"{n}.mp4", 4, sampling="uniform") for n in (0, 1, 2, 0, 1)]
    assert seen == [(tuple(frames.indices.tolist()), frames.fps, tuple(frames.times)) for frames in videos]
    assert len({times for _, _, times in seen}) == 3
    whole = lm._video({"path": str(folder / "2.mp4")})
    part = lm._video({"path": str(folder / "2.mp4"), "video_start": 0.5})
    assert 0 <= part.times[0] < 1 / part.fps and part.times[-1] == pytest.approx(whole.times[-1] - 0.5)


def test_images_stand_where_they_come_among_the_videos(tempme: Any, lm: Any, folder: Path) -> None:
    image, video = Image.fromarray(tiny.video(9)[0]), str(folder / "0.mp4")
    lm.task_dict["i"] = {"test": [{"videos": [image]}, {"videos": [image, video]}, {"videos": [video]}]}

    def asking(context: str, document: int) -> Any:
        options = {"max_new_tokens": 4}
        return SimpleNamespace(args=(context, options, lambda doc: doc["videos"], document, "i", "test"))

    contexts = ["how many", "is this red", "how many"]
    answers = lm.generate_until([asking(context, row) for row, context in enumerate(contexts)])
    frames = [read_frames(video, lm.compressed.host.num_frames, sampling="uniform").pixels]
    prompts = ["<image> how many ?", "<image> <video> is this red ?", "<video> how many ?"]
    given: list[Any] = [([], [image]), (frames, [image]), (frames, [])]
    for answer, prompt, (videos, images) in zip(answers, prompts, given, strict=True):
        own = lm.compressed.answer(prompt, videos, images=images, max_new_tokens=4, do_sample=False)
        assert [answer] == own
    assert lm._prompt("in <image> how many", [image]) == "in <image> how many ?"
    plain = tempme(str(folder / "host"), 1, "cpu", prompt="{video} {text} ?", num_frames=4, method="none")
    assert plain._prompt("how many", [video, image]) == "<video><image> how many ?"


def test_rounds_are_refused(lm: Any) -> None:
    with pytest.raises(NotImplementedError, match="one question at a time"):
        lm.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"max_gen_toks": 7, "temperature": 0, "top_p": 1.0}, {"max_new_tokens": 7, "do_sample": False}),
        ({"max_new_tokens": 7, "max_gen_toks": 9, "top_p": None}, {"max_new_tokens": 7, "do_sample": False}),
        ({"temperature": 0.5, "top_p": 0.9}, {"do_sample": True, "temperature": 0.5, "top_p": 0.9}),
        ({"do_sample": True, "top_k": 5}, {"do_sample": True, "temperature": 1.0, "top_k": 5}),
        ({"do_sample": True, "temperature": 0.0, "top_k": 5}, {"do_sample": False}),
        ({"do_sample": False, "temperature": 0.5, "num_beams": 3}, {"do_sample": False, "num_beams": 3}),
        ({"image_aspect_ratio": "original", "until": ["."]}, {"do_sample": False}),
        ({"unknown": 1}, {"do_sample": False, "unknown": 1}),
    ],
)
def test_generation_options(kwargs: dict[str, Any], expected: dict[str, Any]) -> None:
    stops, options = generation_options(kwargs)
    assert options == {"max_new_tokens": 1024, **expected}
    assert stops == kwargs.get("until", [])


def test_answers_end_at_the_first_stop() -> None:
    assert cut("a dog. runs\n\nUSER", ["\n\n", ".", "", "red"]) == "a dog"
    assert cut("a dog", ["."]) == cut("a dog", []) == "a dog"
    assert generation_options({"until": "ASSISTANT:"})[0] == ["ASSISTANT:"]


def test_videos_are_paths() -> None:
    assert video_of("a.mp4") == video_of(Path("a.mp4")) == ("a.mp4", None, None)
    assert video_of("a.gif")[0] == "a.gif" and video_of("folder/without_suffix")[1] is None
    part = {"type": "video", "path": "a.mkv", "video_start": 1.5, "video_end": 3.0}
    assert video_of(part) == ("a.mkv", 1.5, 3.0) and video_of({"url": "a.webm"})[0] == "a.webm"


@pytest.mark.parametrize("visual", ["a.jpg", "a.wav", {"type": "audio", "url": "a"}, {}])
def test_other_visuals_are_refused(visual: Any) -> None:
    with pytest.raises(ValueError, match="reads video files, and images of PIL: expected the path of a video"):
        video_of(visual)
