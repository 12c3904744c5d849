"""Compressed video-language models to fine-tune: the loss, what trains, prompts, written answers, folders."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integrations import tiny, tiny_post
from integrations.test_compressed import pack
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from tempme_vl.integrations import compress, load_host
from tempme_vl.integrations.tiny import tiny_host, tiny_names
from tempme_vl.manifest import MANIFEST_FILE, write_manifest
from tempme_vl.recipes.options.videollm import VIDEOLLM
from tempme_vl.tasks.inputs import HostInput
from tempme_vl.tasks.videollm import (
    ADAPTER_FOLDER,
    PROMPT,
    TRAINED_FILE,
    VideoLLM,
    create_video_llm,
    default_prompt,
    load_start,
    load_video_llm,
)

QUESTIONS = ("what color is the object", "which way", "what is it")
ANSWERS = ("red", "to the far left", "a dark red ring")
FRAMES = 8
FPS = (8 / 15, 0.25, 3.0)  # of videos of 15, 32 and 2.7 seconds
TIMES = torch.arange(FRAMES) / torch.tensor(FPS).unsqueeze(1)
SCHEDULES: dict[str, dict[str, Any]] = {
    "VideoLlava": {"r": 1, "merge_layers": (3, 4), "merge_frames": (2, 2), "cross_percent": 30, "intra_percent": 10},
    "Qwen2_5_VL": {"merge_frames": (2, 2)},
}
assert set(tiny_names()) == set(SCHEDULES)
TINY = [
    name for name in sorted(SCHEDULES) if name != "Qwen2_5_VL" or tiny_post.PLACED
]  # an old transformers has no way


@pytest.fixture(scope="module", params=TINY)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny host, named by it."""
    folder = tmp_path_factory.mktemp("host") / request.param
    for part in tiny_host(request.param, (*QUESTIONS, *ANSWERS)):
        part.save_pretrained(folder)
    return folder


def created(source: Path, **options: Any) -> VideoLLM:
    """In eval mode, on a host of its own."""
    torch.manual_seed(0)
    method = options.pop("method", "tempme")
    schedule = {} if method == "none" else SCHEDULES[source.name]
    compressed = compress(*load_host(str(source)), method, FRAMES, clip_position_std=0.5, **schedule)
    return create_video_llm(compressed, source=str(source), **options).eval()


def batch_of(model: VideoLLM, rows: tuple[int, ...] = (0, 1, 2), learn: bool = True) -> dict[str, Any]:
    video = torch.randint(0, 256, (3, FRAMES, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    asked = [model.tokenize(QUESTIONS[i], ANSWERS[i] if learn else None) for i in rows]
    texts = {key: [one[key] for one in asked] for key in asked[0]}
    valid = torch.ones(len(rows), dtype=torch.long)
    return {"video": video[list(rows)], "times": TIMES[list(rows)], "valid": valid, **texts}


def shake(model: VideoLLM, std: float = 0.1) -> VideoLLM:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=std)
    return model


# ---- the loss


@torch.no_grad()
def test_without_merging_each_loss_is_the_hosts_own(source: Path) -> None:
    """By its own processor, which is told the frames a second."""
    model = created(source, method="none", lora_rank=0)
    batch, processor, tokenizer = batch_of(model), model.compressed.host.processor, model.compressed.tokenizer
    losses = model(batch)["losses"]
    for row in range(3):
        fps = FPS[row]
        read = {"frames_indices": list(range(FRAMES)), "total_num_frames": FRAMES, "fps": fps, "duration": FRAMES / fps}
        metadata = {"do_sample_frames": False, "video_metadata": [[read]]} if source.name == "Qwen2_5_VL" else {}
        frames = batch["video"][row].to(torch.uint8)
        native = dict(processor(text=[batch["prompt"][row]], videos=[frames], return_tensors="pt", **metadata))
        answer = torch.tensor([[*tokenizer(batch["answer"][row], add_special_tokens=False)["input_ids"], 2]])
        asked = native["input_ids"]
        native["input_ids"] = torch.cat([asked, answer], dim=1)
        native["attention_mask"] = torch.ones_like(native["input_ids"])
        if "mm_token_type_ids" in native:
            native["mm_token_type_ids"] = F.pad(native["mm_token_type_ids"], (0, answer.shape[1]))
        labels = torch.cat([torch.full_like(asked, -100), answer], dim=1)
        expected = model.model(**native, labels=labels).loss
        torch.testing.assert_close(losses[row], expected, rtol=0, atol=1e-5)
        if source.name == "Qwen2_5_VL":  # which the times matter to
            other = model({**batch, "times": batch["times"] * 4})["losses"][row]
            assert (other - expected).abs() > 1e-4


def test_each_loss_stands_alone_whatever_else_is_in_the_batch(source: Path) -> None:
    model = created(source)
    batch = batch_of(model)
    with torch.no_grad():
        losses = model(batch)["losses"]
        for row in range(3):
            one = batch_of(model, (row,))
            torch.testing.assert_close(model(one)["losses"][0], losses[row], rtol=0, atol=1e-5)
            frames = [one["video"][0].to(torch.uint8)]
            inputs = model.compressed.prepare(one["prompt"], frames, labels=one["answer"], times=TIMES[row])
            torch.testing.assert_close(model.compressed(**inputs).loss, losses[row], rtol=0, atol=1e-5)
    assert losses.std() > 0.05


def test_a_batch_without_times_is_refused_where_they_matter(source: Path) -> None:
    model = created(source)
    for learn in (True, False):
        batch = batch_of(model, learn=learn)
        del batch["times"]
        if source.name == "VideoLlava":
            model(batch)
            continue
        with pytest.raises(
            ValueError, match=r"is told when frames were shown: expected 'times'.*got video, valid, pro"
        ):
            model(batch)


def test_unreadable_videos_do_not_count(source: Path) -> None:
    model = created(source)
    features = {"losses": torch.tensor([1.0, 2.0, torch.nan], requires_grad=True)}
    loss = model.loss(features, {"valid": torch.tensor([1, 1, 0])})
    loss.backward()
    assert loss == 1.5 and features["losses"].grad is not None
    assert features["losses"].grad.tolist() == [0.5, 0.5, 0.0]
    assert model.loss(features, {"valid": torch.zeros(3)}) == 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_what_trains_and_nothing_else(source: Path, checkpointing: bool) -> None:
    model = created(source, train_frontend=True).train()
    model.set_grad_checkpointing(checkpointing)
    batch = batch_of(model)
    shake(model, 0.02)  # LoRA's B starts at 0, and A then has no gradient
    model.loss(model(batch), batch).backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    unused = {name for name in trained - reached if "post_layernorm" in name or name.endswith(".k_proj.bias")}
    assert reached == trained - unused and len(unused) < 10  # keys' biases have gradients of rounding, or none
    new = {name for name in trained if model.is_new_parameter(name)}
    language = {name for name in trained if "language_model" in name}
    assert language and all("lora_" in name for name in language)
    assert new == language | {name for name in trained if name.startswith("merging.")}
    assert (source.name == "VideoLlava") == bool(new - language)
    assert not any("lm_head" in name or "image_tower" in name for name in trained)
    if checkpointing:
        plain = shake(created(source, train_frontend=True).train(), 0.02)
        plain.loss(plain(batch), batch).backward()
        for name, weight in plain.named_parameters():
            if name in reached:
                torch.testing.assert_close(model.get_parameter(name).grad, weight.grad, rtol=1e-4, atol=1e-6)


def test_a_frozen_front_end_leaves_projector_and_lora(source: Path) -> None:
    model = created(source)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    projector = {"VideoLlava": "multi_modal_projector", "Qwen2_5_VL": "merger"}[source.name]
    assert all("lora_" in name or projector in name for name in trained)
    assert any(projector in name for name in trained)
    plain = created(source, lora_rank=0)
    assert not isinstance(plain.model, PeftModel)
    assert all(projector in name for name, weight in plain.named_parameters() if weight.requires_grad)


# ---- prompts and answers


def test_prompts_and_options_as_texts(source: Path) -> None:
    model = created(source)
    video = {
        "VideoLlava": "USER: <video>\n",
        "Qwen2_5_VL": "USER: <|vision_start|><|video_pad|><|vision_end|> ",
    }[source.name]
    assert model.prompt == video + "{question} ASSISTANT:"
    assert model.tokenize("which way") == {"prompt": f"{video}which way ASSISTANT:"}
    assert model.tokenize("which", "left", ("left", "right")) == {
        "prompt": f"{video}which Options: left, right ASSISTANT:",
        "answer": "left",
    }
    for prompt in ("{question}", model.compressed.host.placeholder, model.prompt + "{question}"):
        with pytest.raises(ValueError, match="expected a prompt with"):
            created(source, prompt=prompt)


def test_a_chat_formats_start_token_is_written_once() -> None:
    _, processor = tiny_host("VideoLlava", QUESTIONS)
    assert default_prompt(processor, "<video>") == PROMPT.replace("{video}", "<video>")
    chat = "{% for p in messages[0]['content'] %}{{ '<video>' if p['type'] == 'video' else p['text'] }} {% endfor %}go"
    processor.chat_template = "<s>" + chat
    assert default_prompt(processor, "<video>") == "<video> {question} go"
    processor.tokenizer.chat_template, processor.chat_template = chat, None
    assert default_prompt(processor, "<video>") == "<video> {question} go"
    processor.chat_template = "{{ messages[0]['content'][1]['text'] }}"
    with pytest.raises(ValueError, match=r"does not write '<video>' and the question once each: '\{question\}'"):
        default_prompt(processor, "<video>")


def test_answers_are_written_greedily_up_to_an_end_token(source: Path) -> None:
    model = shake(created(source, answer_tokens=5))
    batch = batch_of(model, learn=False)
    written = model(batch)["prediction"]
    assert written.shape == (3, 5)
    for row in range(3):  # a batch is padded on the left
        one = model(batch_of(model, (row,), learn=False))["prediction"]
        assert model.text(one[0].tolist()) == model.text(written[row].tolist())
    ids = model.compressed.tokenizer("dark red", add_special_tokens=False)["input_ids"]
    assert model.text([*ids, 2, *ids]) == "dark red" and model.text(ids) == "dark red" and model.text([2]) == ""
    # an end token of the host's own ends an answer, too
    host, processor = load_host(str(source))
    host.generation_config.eos_token_id = [ids[1], 2]
    other = create_video_llm(compress(host, processor, num_frames=FRAMES, **SCHEDULES[source.name]))
    assert other.text([ids[0], ids[1], ids[0]]) == "dark"


def test_it_learns_answers(source: Path) -> None:
    model = created(source, train_frontend=True).train()
    optimizer = torch.optim.Adam([weight for weight in model.parameters() if weight.requires_grad], lr=3e-3)
    batch = batch_of(model)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()
    written = model.eval()(batch_of(model, learn=False))["prediction"]
    assert [model.text(row) for row in written.tolist()] == list(ANSWERS)


def test_half_precision_leaves_rotary_frequencies(source: Path) -> None:
    model = created(source)
    exact = {name: buffer.clone() for name, buffer in model.named_buffers() if buffer.is_floating_point()}
    model.bfloat16()
    assert exact and all(torch.equal(model.get_buffer(name), buffer) for name, buffer in exact.items())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert model(batch_of(model))["losses"].dtype == torch.float32


# ---- folders


@pytest.mark.parametrize(("lora_rank", "train_frontend"), [(4, True), (4, False), (0, True)])
def test_a_folder_gives_the_model_back(source: Path, lora_rank: int, train_frontend: bool, tmp_path: Path) -> None:
    model = shake(created(source, lora_rank=lora_rank, train_frontend=train_frontend, answer_tokens=4))
    model.input = HostInput("uniform")
    model.save_pretrained(tmp_path)
    again = load_video_llm(tmp_path)
    batch = batch_of(model, learn=False)
    assert torch.equal(again(batch)["prediction"], model(batch)["prediction"])
    assert torch.equal(again(batch_of(model))["losses"], model(batch_of(model))["losses"])
    left, right = model.state_dict(), again.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    for name in ("prompt", "answer_tokens", "source", "input"):
        assert getattr(again, name) == getattr(model, name)
    assert (tmp_path / ADAPTER_FOLDER).is_dir() == bool(lora_rank)
    # the base model's frozen weights are not written again
    kept = load_file(tmp_path / TRAINED_FILE)
    assert not any("language_model" in name or name.startswith("base_model") for name in kept)
    tower = {"VideoLlava": "video_tower", "Qwen2_5_VL": "patch_embed"}[source.name]
    assert any(tower in name for name in kept) == train_frontend
    # what was trained is told after loading, too, so that the same is written again
    again.save_pretrained(tmp_path / "again")
    files = json.loads((tmp_path / MANIFEST_FILE).read_text())["files"]
    assert json.loads((tmp_path / "again" / MANIFEST_FILE).read_text())["files"] == files


def test_whole_weights_may_come_from_elsewhere(source: Path, tmp_path: Path) -> None:
    """As under ZeRO-3, where the module's own are partitioned."""
    model = shake(created(source, train_frontend=True))
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    model.save_pretrained(tmp_path, state)
    again = load_video_llm(tmp_path).state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_folders_that_do_not_fit_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected videollm\.json in"):
        load_video_llm(source)
    model = created(source)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "videollm.json").read_text())
    (tmp_path / "videollm.json").write_text(json.dumps({**config, "source": str(tmp_path / "moved")}))
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"could not load '.*moved'"):
        load_video_llm(tmp_path)
    assert load_video_llm(tmp_path, source).source == str(source)
    save_file({"model.nothing": torch.zeros(1)}, tmp_path / TRAINED_FILE)
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"does not fit .* \['model\.nothing'\]"):
        load_video_llm(tmp_path, source)
    model.source = None
    with pytest.raises(ValueError, match="give VideoLLM the `source` of its host"):
        model.save_pretrained(tmp_path)


def test_a_host_that_lacks_weights_is_refused(source: Path, tmp_path: Path) -> None:
    model, processor = load_host(str(source))
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in state if "lm_head" in name)
    del state[gone]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a .*lm_head"):
        load_host(str(tmp_path))


# ---- other hosts

NAMES = [("inside", name) for name in tiny.MODELS]
NAMES += [("behind", name) for name in tiny_post.MODELS if tiny_post.NEEDS.get(name, True)]


@pytest.mark.parametrize(("where", "name"), NAMES)
def test_every_host_trains_and_writes(where: str, name: str) -> None:
    if where == "inside":
        layers = 4 if name in ("LlavaOnevision", "InstructBlipVideo", "PerceptionLM") else 3
        (host, processor), frames, prompt = tiny.build(name), tiny.FRAMES, "what is <video> {question}"
        options = tiny.schedule("tempme", layers)
    else:
        (host, processor), frames = tiny_post.build(name), tiny_post.FRAMES
        prompt, options = f"{tiny_post.placeholder(name)}{{question}}:", {"merge_frames": (2, 2)}
    compressed = compress(host, processor, num_frames=frames, **options)
    model = create_video_llm(compressed, lora_rank=2, train_frontend=True, prompt=prompt, answer_tokens=3).train()
    video = torch.randint(0, 256, (2, frames, 3, 32, 32), dtype=torch.uint8)
    batch = {"video": video, "times": torch.arange(frames).expand(2, -1).float(), "valid": torch.ones(2)}
    batch["prompt"] = [model.tokenize("why")["prompt"]] * 2
    model.loss(model({**batch, "answer": ["red", "two dog"]}), batch).backward()
    reached = {part for part, weight in model.named_parameters() if weight.grad is not None}
    assert all("lora_" in part for part in reached if "language_model." in part)
    assert any("lora_" in part for part in reached)
    outside = [part for part in reached if "lora_" not in part and not part.startswith("merging.")]
    assert len(outside) > 10
    matrices = {part for part, weight in model.named_parameters() if weight.requires_grad and weight.ndim > 1}
    # weight decay must not shrink what no gradient holds up
    assert not [part for part in matrices - reached if "lora_" not in part]
    assert model.eval()(batch)["prediction"].shape == (2, 3)


@pytest.mark.parametrize(
    ("part", "options"), [("multi_modal_projector", {}), ("video_tower", {"train_frontend": True})]
)
def test_quantised_weights_that_are_to_train_are_refused(part: str, options: dict[str, Any]) -> None:
    """As bitsandbytes packs them; the language model's stay as they are under LoRA."""
    host, processor = tiny.build("VideoLlava")
    pack(host.model.language_model)
    compressed = compress(host, processor, num_frames=tiny.FRAMES, **tiny.schedule("tempme", 3))
    pack(getattr(host.model, part))
    what = "projector" if part == "multi_modal_projector" else "tower"
    with pytest.raises(
        ValueError, match=rf"the {what} trains, and \d+ of its \d+ weights are quantised \(torch.uint8\)"
    ):
        create_video_llm(compressed, lora_rank=0, prompt="<video> {question}", **options)


def test_a_host_without_a_known_projector_is_refused() -> None:
    host, processor = tiny.build("VideoLlava")
    host.model.bridge, host.model._modules["multi_modal_projector"] = host.model.multi_modal_projector, nn.Identity()
    compressed = compress(host, processor, num_frames=tiny.FRAMES, **tiny.schedule("tempme", 3))
    with pytest.raises(ValueError, match=r"has none of multi_modal_projector, which VideoLlavaHost\.projector says"):
        create_video_llm(compressed)


@pytest.mark.parametrize("name", TINY)
def test_tiny_hosts_are_the_same_each_time_and_leave_the_random_state(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    (first, processor), (second, _) = (tiny_host(name, ["b a", "c"]) for _ in range(2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert processor.tokenizer("a c nothing")["input_ids"][1:] == [
        processor.tokenizer.convert_tokens_to_ids(word) for word in ("a", "c", "<unk>")
    ]
    with pytest.raises(ValueError, match="no tiny 'Nothing'; expected one of VideoLlava, Qwen2_5_VL"):
        tiny_host("Nothing", ["a"])


def test_a_whole_language_model_trains_and_comes_back(source: Path, tmp_path: Path) -> None:
    model = created(source, lora_rank=0, train_language_model=True)
    trained = {key for key, weight in model.model.named_parameters() if weight.requires_grad}
    language = [
        key for key, _ in model.model.named_parameters() if "language_model" in key or key.startswith("lm_head")
    ]
    assert set(language) <= trained and not any("tower" in key or "blocks" in key for key in trained)
    with torch.no_grad():
        model.model.get_output_embeddings().weight.mul_(1.1)
        model.save_pretrained(tmp_path)
        again = load_video_llm(tmp_path)
        assert torch.equal(again(batch_of(again))["losses"], model(batch_of(model))["losses"])
    assert {key for key, weight in again.model.named_parameters() if weight.requires_grad} == trained
    with pytest.raises(ValueError, match="by LoRA or as a whole; got lora_rank=4"):
        created(source, lora_rank=4, train_language_model=True)


def test_a_run_goes_on_from_what_another_exported(source: Path, tmp_path: Path) -> None:
    asked = HostInput("uniform", 48)
    first = created(source, lora_rank=0, train_language_model=True, train_frontend=True, input=asked, answer_tokens=5)
    shake(first)
    first.save_pretrained(tmp_path / "first")
    start = load_start(str(tmp_path / "first"))
    assert start.source == str(source)
    compressed = compress(start.model, start.processor, "none", FRAMES)
    second = create_video_llm(
        compressed, lora_rank=0, train_language_model=True, train_frontend=True, source=start.source
    )
    start.check(second)
    assert all(torch.equal(value, first.model.state_dict()[key]) for key, value in second.model.state_dict().items())
    second.save_pretrained(tmp_path / "second")
    again = load_video_llm(tmp_path / "second")
    assert all(torch.equal(value, first.model.state_dict()[key]) for key, value in again.model.state_dict().items())
    with pytest.raises(ValueError, match="would be lost: train the same parts"):
        start.check(create_video_llm(compress(start.model, start.processor, "none", FRAMES), lora_rank=4))
    created(source, lora_rank=4).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="has LoRA beside"):
        load_start(str(tmp_path / "lora"))
    plain = load_start(str(source))
    assert plain.source == str(source) and not plain.trained
    defaults = VIDEOLLM.parse(["--host", str(tmp_path / "first")])
    assert (defaults.image_size, defaults.prompt, defaults.answer_tokens) == (48, first.prompt, 5)
