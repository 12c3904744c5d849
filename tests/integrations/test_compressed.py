"""Prompts, labels, wrappers and wrong input: what is the same for all hosts."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from integrations import tiny, tiny_post
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tempme_vl.integrations import Compressed, SampledVideo, compress, load_compressed
from tempme_vl.integrations.costs import prefill_gflops
from tempme_vl.integrations.in_encoder import InEncoderHost
from tempme_vl.integrations.videos import pair_up, sample, without_start
from tempme_vl.manifest import write_manifest

TEMPME = tiny.schedule("tempme", 3)
VIDEO = tiny.TOKEN["<video>"]


@cache
def llava() -> Compressed:
    model, processor = tiny.build("VideoLlava")
    return compress(model, processor, num_frames=tiny.FRAMES, feed="embeddings", **TEMPME)


def test_it_shows_itself_in_a_line() -> None:
    shown = repr(llava())
    assert "VideoLlavaForConditionalGeneration, tempme: 4 frames" in shown and "\n" not in shown and len(shown) < 200
    assert llava().placeholder == "<video>"


def test_sampling_takes_the_middles_of_equal_parts() -> None:
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    assert sample(frames, 10).indices == tuple(range(10))
    assert sample(frames, 2, fps=5.0).indices == (2, 7) and sample(frames[:1], 3).indices == (0, 0, 0)
    assert sample(frames, 5).frames[:, 0, 0, 0].tolist() == [1, 3, 5, 7, 9]
    channels_first = torch.from_numpy(frames).expand(10, 4, 5, 3).permute(0, 3, 1, 2)
    assert np.array_equal(sample(channels_first, 5).frames[:, :1, :1], sample(frames, 5).frames)
    assert sample([tiny.video(0)[0]] * 4, 2).frames.shape == (2, 32, 32, 3)


def test_frames_that_were_chosen_already_stay() -> None:
    chosen = SampledVideo(tiny.video(0, tiny.FRAMES), (3, 5, 8, 13), fps=2.5)
    assert sample(chosen, tiny.FRAMES) is chosen
    ours = llava().prepare(tiny.ASK, [chosen])["inputs_embeds"]
    assert torch.equal(ours, llava().prepare(tiny.ASK, [chosen.frames])["inputs_embeds"])
    with pytest.raises(ValueError, match="expected a SampledVideo of 5 frames; got one of 4"):
        sample(chosen, 5)


@pytest.mark.parametrize(
    "video",
    [
        np.zeros((4, 8, 8, 3), dtype=np.float32),
        np.zeros((8, 8, 3), dtype=np.uint8),
        np.zeros((0, 8, 8, 3), dtype=np.uint8),
        np.zeros((4, 8, 8, 1), dtype=np.uint8),
        [np.zeros((8, 8, 3), dtype=np.uint8), np.zeros((8, 9, 3), dtype=np.uint8)],
    ],
)
def test_other_videos_are_refused(video: Any) -> None:
    with pytest.raises(ValueError, match="expected a video as uint8 frames"):
        sample(video, 4)


def test_videos_find_their_prompts() -> None:
    a, b, c = (tiny.video(i) for i in range(3))
    assert pair_up("x <video>", [a], "<video>") == (["x <video>"], [[a]])
    assert pair_up("<video> <video>", [a, b], "<video>")[1] == [[a, b]]
    assert pair_up("<video> <video>", [[a, b]], "<video>")[1] == [[a, b]]
    assert pair_up(["<video> <video>", "none", "<video>"], [a, b, c], "<video>")[1] == [[a, b], [], [c]]
    assert pair_up(["<video> <video>", "none", "<video>"], [[a, b], [], [c]], "<video>")[1] == [[a, b], [], [c]]
    assert pair_up("none", [], "<video>")[1] == [[]]
    images = [Image.fromarray(frame) for frame in a]
    for frames in (list(a), images):  # a list of frames is one video
        assert pair_up("<video>", [frames], "<video>")[1][0][0] is frames
        assert pair_up("<video>", [[frames]], "<video>")[1][0][0] is frames
    for prompts, videos in (("none", [a]), ("<video>", []), (["<video>", "<video>"], [[a, b], []])):
        with pytest.raises(ValueError, match="one video for every '<video>'"):
            pair_up(prompts, videos, "<video>")


def test_labels_cover_words_or_answers_alone() -> None:
    words = tiny.TOKEN
    text, videos = ["why <video>", "what is the <video> dog"], [tiny.video(0), tiny.video(1)]
    inputs = llava().prepare(text, videos, labels=True)
    kept = [[i for i in row if i != -100] for row in inputs["labels"].tolist()]
    assert kept == [[1, words["why"]], [1, *(words[w] for w in ("what", "is", "the", "dog"))]]
    inputs = llava().prepare(text, videos, labels=["red", "two blue"])
    kept = [[i for i in row if i != -100] for row in inputs["labels"].tolist()]
    assert kept == [[words["red"], 2], [words["two"], words["blue"], 2]]
    assert inputs["attention_mask"][0].tolist() == sorted(inputs["attention_mask"][0].tolist(), reverse=True)
    left = llava().prepare(text, videos)
    assert "labels" not in left and left["attention_mask"][0].tolist() == sorted(left["attention_mask"][0].tolist())
    with pytest.raises(ValueError, match="an answer for each of 2 prompts"):
        llava().prepare(text, videos, labels=["red"])


def test_answers_are_texts_without_the_prompt() -> None:
    answers = llava().answer(["why <video>", tiny.ASK], [tiny.video(0), tiny.video(1)], max_new_tokens=3)
    assert [len(answer.split()) for answer in answers] == [3, 3]
    assert all(word in tiny.WORDS for answer in answers for word in answer.split())


def test_any_frames_of_any_size() -> None:
    for video in (tiny.video(0, frames=1, side=20), tiny.video(0, frames=37, side=50), list(tiny.video(0, frames=5))):
        assert llava().answer("why <video>", [video], max_new_tokens=1)


def test_lora_is_seen_and_the_front_end_stays_out_of_the_model(tmp_path: Path) -> None:
    model, processor = tiny.build("VideoLlava")
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    before = compress(model, processor, num_frames=tiny.FRAMES, **TEMPME)
    plain = tiny.new_tokens(before, tiny.ASK, [tiny.video(0)])
    wrapped = get_peft_model(model, lora)
    after = compress(wrapped, processor, num_frames=tiny.FRAMES, clip_position_std=0.1, **TEMPME)
    inputs = after.prepare(tiny.ASK, [tiny.video(0)], labels=["red dog"])
    wrapped(**inputs).loss.backward()
    with_gradient = {key for key, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert all("lora_" in key for key in with_gradient)
    assert all(any(part in key for key in with_gradient) for part in ("video_tower", "language_model"))
    assert all(p.grad is not None for p in after.merging.parameters())
    own = {id(p) for p in wrapped.parameters()}
    assert not any(id(p) in own for p in after.merging.parameters())
    # the one compressed before sees the adapters too
    adapted = tiny.new_tokens(before, tiny.ASK, [tiny.video(0)])
    with wrapped.disable_adapter():
        assert torch.equal(tiny.new_tokens(before, tiny.ASK, [tiny.video(0)]), plain)
    assert not torch.equal(adapted, plain)
    after.save_merging(tmp_path)
    again = load_compressed(tmp_path, wrapped, processor)
    assert torch.equal(
        tiny.new_tokens(again, tiny.ASK, [tiny.video(0)]), tiny.new_tokens(after, tiny.ASK, [tiny.video(0)])
    )


def test_half_precision_and_train_mode() -> None:
    model, processor = tiny.build("LlavaOnevision")
    model = model.to(torch.bfloat16).train()
    compressed = compress(model, processor, num_frames=tiny.FRAMES, **tiny.schedule("tempme", 4))
    inputs = compressed.prepare(tiny.ASK, [tiny.video(0)], labels=True)
    output = compressed(**inputs)
    output.loss.backward()
    assert output.logits.dtype == torch.bfloat16 and torch.isfinite(output.loss)


def test_tokens_and_costs_are_logged(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = tiny.build("LlavaOnevision")
    with caplog.at_level("INFO", "tempme_vl"):
        fewer = compress(model, processor, num_frames=tiny.FRAMES, **tiny.schedule("tempme", 4))
        compress(model, processor, "tome", tiny.FRAMES, r=1)
    own = [record for record in caplog.records if record.name.startswith("tempme_vl.")]
    assert [record.levelname for record in own] == ["INFO", "WARNING"]
    assert own[0].getMessage() == fewer.describe() and "Beware" not in fewer.describe()
    assert "4 frames of 32 x 32 pixels" in fewer.describe() and "a multiply-add is 1 FLOP" in fewer.describe()
    assert "Beware: 49 tokens are more than the 17 of the host's own way" in own[1].getMessage()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["VideoLlava", "InternVL", "SmolVLM"])
def test_costs_count_a_multiply_add_once(name: str) -> None:
    """Against torch's own counter, which has 2 for it. It may leave attention out, which is a small part here."""
    kit: Any = tiny if name in tiny.MODELS else tiny_post
    model, processor = kit.build(name)
    host = compress(model, processor, "none", kit.FRAMES).host
    costs, length = host.costs(), 40
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        host.language_model(inputs_embeds=torch.zeros(1, length, 32))
    assert 0.8 < 1e9 * prefill_gflops(host, length) / (counted.get_total_flops() / 2) < 1.3
    height, width = costs.frame
    with torch.no_grad(), FlopCounterMode(display=False) as counted:
        if name == "VideoLlava":
            model.model.video_tower(torch.zeros(kit.FRAMES, 3, height, width))
        else:
            host.features([sample(np.zeros((kit.FRAMES, height, width, 3), np.uint8), kit.FRAMES)])
    assert 0.6 < 1e9 * costs.native_tower / (counted.get_total_flops() / 2) < 1.6


def test_prefill_counts_the_half_of_attention_that_is_causal() -> None:
    """Plain attention multiplies by the other half, too, and torch's counter sees it."""
    model, processor = tiny.build("VideoLlava")
    host = compress(model, processor, "none", tiny.FRAMES).host
    model.set_attn_implementation("eager")
    counts = []
    for length in (40, 80):
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            host.language_model(inputs_embeds=torch.zeros(1, length, 32))
        counts.append(counted.get_total_flops() / 2)
    ours = [1e9 * prefill_gflops(host, length) for length in (40, 80)]
    assert ours[1] - 2 * ours[0] == pytest.approx((counts[1] - 2 * counts[0]) / 2, rel=0.02)


class Packed(torch.nn.Linear):
    """As bitsandbytes has it in 4 bits: two weights in a byte, in a column."""

    def __init__(self, linear: Any):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)


def pack(module: torch.nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, Packed(child))
        else:
            pack(child)


@pytest.mark.parametrize("name", ["VideoLlava", "InternVL"])
def test_packed_weights_count_as_what_they_stand_for(name: str) -> None:
    kit: Any = tiny if name in tiny.MODELS else tiny_post
    model, processor = kit.build(name)
    compressed = compress(model, processor, "none", kit.FRAMES)
    before = compressed.describe()
    pack(model)
    assert sum(p.numel() for p in model.parameters() if p.dtype == torch.uint8) > 10_000
    assert compress(model, processor, "none", kit.FRAMES).describe() == before


def test_models_that_do_not_fit_are_refused() -> None:
    model, processor = tiny.build("VideoLlava")
    with pytest.raises(ValueError, match=r"LlamaModel is no video-language model .* known are VideoLlava"):
        compress(model.model.language_model, processor)
    with pytest.raises(ValueError, match="one vision_feature_layer"):
        model.config.vision_feature_layer = [-2, -1]
        compress(model, processor, "none")
    pooled, processor = tiny.build("LlavaNextVideo")
    pooled.model.vision_resampler = type(pooled.model.vision_resampler)(
        transformers.LlavaNextVideoConfig(
            vision_config=pooled.config.vision_config, text_config=pooled.config.text_config, spatial_pool_mode="conv"
        )
    )
    compress(pooled, processor, "none")
    with pytest.raises(ValueError, match="weights of its own and needs a grid"):
        compress(pooled, processor, "tome", r=1)


def test_chat_messages_and_parts_of_a_processor_are_refused() -> None:
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "why"}]}]
    for text in (messages, [messages]):
        with pytest.raises(ValueError, match=r"expected prompts as texts; got .*processor\.apply_chat_template"):
            llava().prepare(text, [tiny.video(0)])
    model, processor = tiny.build("VideoLlava")
    for part in (processor.tokenizer, processor.video_processor):
        with pytest.raises(ValueError, match="expected the model's whole processor"):
            compress(model, part, num_frames=tiny.FRAMES, **TEMPME)


@pytest.mark.parametrize("name", ["VideoLlava", "InstructBlipVideo"])
def test_a_start_token_is_written_once(name: str) -> None:
    """A chat format may begin with the one that the tokenizer adds."""
    compressed = compress(*tiny.build(name), "none", tiny.FRAMES, feed="embeddings")
    tokens = compressed.host.encode([sample(tiny.video(0), tiny.FRAMES)], [tiny.ASK])
    ids = compressed.host.input_ids(tiny.ASK, tokens)
    assert compressed.host.input_ids(f"<s>{tiny.ASK}", tokens) == ids and ids.count(1) == 1
    assert compressed.host.input_ids(f"why <s> {tiny.ASK}", tokens).count(1) == 2
    adds_none = tiny_post.tokenizer()
    assert without_start("<s>why", adds_none) == "<s>why" and without_start("<s>why", tiny.tokenizer()) == "why"


def test_generate_gives_a_dictionary_where_one_is_asked_for() -> None:
    for feed in (None, "embeddings"):
        compressed = compress(*tiny.build("VideoLlava"), num_frames=tiny.FRAMES, feed=feed, **TEMPME)
        options = {"return_dict_in_generate": True, "output_logits": True}
        plain = tiny.new_tokens(compressed, tiny.ASK, [tiny.video(0)])
        output = tiny.new_tokens(compressed, tiny.ASK, [tiny.video(0)], **options)
        assert torch.equal(output.sequences, plain) and len(output.logits) == plain.shape[1]
        answers = compressed.answer(
            tiny.ASK, [tiny.video(0)], max_new_tokens=tiny.NEW_WORDS, do_sample=False, **options
        )
        assert answers == compressed.tokenizer.batch_decode(plain)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ({"fps": 1.0, "times": [[0, 1, 2, 3]]}, "got both"),
        ({"fps": 0.0}, "above 0; got fps=0.0"),
        ({"fps": [1.0]}, r"expected fps for each of 2 videos \(\[1, 1\] a prompt\); got \[1.0\]"),
        ({"fps": [[1.0, 2.0], []]}, "expected fps for each of 2 videos"),
        ({"fps": ["1", 2.0]}, "got fps='1'"),
        ({"fps": [float("nan"), 2.0]}, "got fps=nan"),
        ({"times": [0.0, 1.0, 2.0, 3.0]}, "expected times for each of 2 videos"),
        ({"times": [[0, 1, 2, 3], [0, 1, 2]]}, r"times of 4 frames in seconds, .*got \(0.0, 1.0, 2.0\)"),
        ({"times": [[0, 1, 2, 3], [0, 2, 1, 3]]}, "finite and ascending"),
        ({"times": [[0, 1, 2, 3], [0, 1, 2, float("inf")]]}, "finite and ascending"),
    ],
)
def test_times_that_do_not_fit_are_refused(times: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llava().prepare([tiny.ASK] * 2, [tiny.video(0), tiny.video(1)], **times)


def test_what_a_sampled_video_knows_of_its_time() -> None:
    frames = np.zeros((4, 1, 1, 3), dtype=np.uint8)
    told = sample(np.zeros((10, 1, 1, 3), dtype=np.uint8), 4, fps=2.0)
    assert told.seconds == (0.5, 1.5, 3.0, 4.0) and (told.interval, told.duration) == (1.25, 5.0)
    timed = sample(np.zeros((10, 1, 1, 3), dtype=np.uint8), 4, times=np.arange(10) / 2)
    assert (timed.seconds, timed.interval, timed.duration) == (told.seconds, told.interval, told.duration)
    middles = SampledVideo(frames, (1, 4, 7, 10), times=(0.5, 2.0, 3.5, 5.0))
    given = sample(SampledVideo(frames, (1, 4, 7, 10)), 4, times=middles.times)
    assert given.frames is frames and given.times == middles.times and given.indices == middles.indices
    assert (middles.interval, middles.duration) == (1.5, 5.5) and middles.is_timed
    read = SampledVideo(frames, (0, 5, 10, 15), fps=2.0, times=(0.0, 2.5, 5.0, 7.5))
    assert (read.interval, read.duration) == (2.5, 8.0)
    still = sample(np.zeros((1, 1, 1, 3), dtype=np.uint8), 4, times=[3.0])
    assert (still.seconds, still.interval) == ((3.0,) * 4, 0.0)
    unknown = sample(frames, 4)
    assert not unknown.is_timed and unknown.interval == 1 / 24 and unknown.seconds[3] == 3 / 24


def test_ways_that_are_not_there_are_refused() -> None:
    model, processor = tiny.build("InstructBlipVideo")
    with pytest.raises(ValueError, match="takes video features by \\['embeddings'\\]"):
        compress(model, processor, "none", feed="encoder_outputs")


def test_a_placeholder_that_the_tokenizer_breaks_is_refused() -> None:
    model, processor = tiny.build("VideoLlava")
    model.config.video_token_index = tiny.TOKEN["sleeps"]  # a word, which does not come in a row without spaces
    with pytest.raises(ValueError, match="has 0 places for 68 visual tokens"):
        compress(model, processor, "none", tiny.FRAMES).prepare(tiny.ASK, [tiny.video(0)])


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected tempme\.json"):
        load_compressed(tmp_path)
    model, processor = tiny.build("VideoLlava")
    compress(model, processor, num_frames=tiny.FRAMES, **TEMPME).save_merging(tmp_path)
    (tmp_path / "tempme.safetensors").unlink()
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match="does not fit the schedule"):
        load_compressed(tmp_path, model, processor)
    other, processor = tiny.build("LlavaNextVideo")
    with pytest.raises(ValueError, match=r"compresses a VideoLlava.*; got a LlavaNextVideo"):
        load_compressed(tmp_path, other, processor)


def test_a_budget_chooses_the_merging_inside_a_tower() -> None:
    def host(method: str, **options: Any) -> InEncoderHost:
        made = compress(*tiny.build("VideoLlava"), method, num_frames=tiny.FRAMES, **options).host
        assert isinstance(made, InEncoderHost)
        return made

    whole = host("none").tokens()
    assert whole is not None
    for budget in (0.5, 0.25):
        tokens = host("tempme", budget=budget).tokens()
        assert tokens is not None and 0.8 * budget * whole < tokens <= budget * whole
    assert host("tome", tokens=40).tokens() == 40
