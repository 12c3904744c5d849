"""A compressed model as the processor that pipelines and the server of transformers call."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from integrations import tiny, tiny_post
from PIL.Image import fromarray

from tempme_vl.data.rendered import write_video
from tempme_vl.integrations import Compressed, compress
from tempme_vl.integrations.processor import CompressedProcessor

pytestmark = pytest.mark.skipif(not tiny_post.NEW, reason="features go in by embeddings alone, which is refused")

FRAMES, WRITTEN = 4, {"max_new_tokens": 5, "do_sample": False}
TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'text' %}"
    "{{ part['text'] }} {% else %}PLACE {% endif %}{% endfor %}{% endfor %}"
)


def build(name: str) -> Compressed:
    model, processor = tiny_post.build(name) if name.startswith("Qwen") else tiny.build(name)
    schedule = {} if name.startswith("Qwen") else tiny.schedule("tempme", 3)
    compressed = compress(model, processor, "tempme", FRAMES, **schedule)
    processor.chat_template = TEMPLATE.replace("PLACE", compressed.placeholder)
    return compressed


def frames(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (FRAMES, 32, 32, 3), dtype=np.uint8)


def chat(video: Any, name: str = "video") -> list[dict[str, Any]]:
    parts = [{"type": "video", name: video}, {"type": "text", "text": "what why"}]
    return [{"role": "user", "content": parts}]


@pytest.mark.filterwarnings("ignore:.*nobody said so")
@pytest.mark.parametrize("task", ["image-text-to-text", "any-to-any"])
@pytest.mark.parametrize("name", ["Qwen2.5-VL", "VideoLlava"])
def test_a_pipeline_answers_as_the_compressed_model(name: str, task: str) -> None:
    compressed = build(name)
    pipe = transformers.pipeline(task, model=compressed.model, processor=CompressedProcessor(compressed))
    (found,) = pipe(text=chat(frames()), return_full_text=False, **WRITTEN)
    (expected,) = compressed.answer(f"{compressed.placeholder} what why ", [frames()], **WRITTEN)
    assert found["generated_text"].strip() == expected  # the prompt is cut off in front of a space


def test_a_saved_folder_is_enough_for_a_pipeline(tmp_path: Path) -> None:
    compressed = build("VideoLlava")
    file = tmp_path / "clip.mp4"
    write_video(file, frames().repeat(2, 1).repeat(2, 2))
    folder = tmp_path / "saved"
    compressed.save_pretrained(folder)
    CompressedProcessor(compressed).save_pretrained(folder)
    pipe = transformers.pipeline("any-to-any", model=str(folder), trust_remote_code=True)
    assert isinstance(pipe.processor, CompressedProcessor)
    found = [answer[0]["generated_text"] for answer in pipe([chat(str(file)), chat(str(file), "url")], **WRITTEN)]
    expected = compressed.answer(f"{compressed.placeholder} what why ", [file], **WRITTEN)
    written = [messages[-1]["content"].strip() for messages in found]
    assert written == expected * 2
    held = sum(weight.numel() for weight in pipe.processor.compressed.model.parameters())
    assert held < sum(weight.numel() for weight in compressed.model.parameters())


def test_a_video_may_come_as_its_bytes(tmp_path: Path) -> None:
    compressed = build("VideoLlava")
    file = tmp_path / "clip.mp4"
    write_video(file, frames().repeat(2, 1).repeat(2, 2))
    url = f"data:video/mp4;base64,{base64.b64encode(file.read_bytes()).decode()}"
    processor = CompressedProcessor(compressed)
    made = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "num_frames": 32}
    from_path, from_bytes, from_uri = (
        processor.apply_chat_template(chat(given, "url"), **made)["mm_encoder_outputs"]["video"]
        for given in (str(file), url, file.as_uri())
    )
    assert from_bytes.pooler_output[0].equal(from_path.pooler_output[0])
    assert from_uri.pooler_output[0].equal(from_path.pooler_output[0])


def test_an_image_may_come_as_a_file_or_its_bytes(tmp_path: Path) -> None:
    compressed = build("Qwen2.5-VL")
    processor, file, image = CompressedProcessor(compressed), tmp_path / "seen.png", fromarray(frames()[0])
    image.save(file)
    processor.compressed.host.processor.chat_template = TEMPLATE.replace("PLACE", compressed.image_placeholder or "")
    url = f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"
    expected = compressed.prepare(f"{compressed.image_placeholder} what ", images=[image])["mm_encoder_outputs"][
        "image"
    ]
    for given in (image, str(file), url):
        part = {"type": "image", "url": given}
        message = {"role": "user", "content": [part, {"type": "text", "text": "what"}]}
        made = processor.apply_chat_template([message], tokenize=True, return_dict=True)
        assert made["mm_encoder_outputs"]["image"].pooler_output[0].equal(expected.pooler_output[0])


def test_what_cannot_be_is_refused() -> None:
    compressed = build("VideoLlava")
    processor, made = CompressedProcessor(compressed), {"tokenize": True, "return_dict": True}
    with pytest.raises(ValueError, match="get it first"):
        processor.apply_chat_template(chat("https://example.org/clip.mp4", "url"), **made)
    with pytest.raises(ValueError, match="the video as base64 in a data: URL"):
        processor.apply_chat_template(chat("data:video/mp4;base64,%%%", "url"), **made)
    with pytest.raises(ValueError, match="expected return_dict=True"):
        processor.apply_chat_template(chat(frames()), tokenize=True)
    with pytest.raises(ValueError, match=r"got \{'type': 'video'\}"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}], **made)
    with pytest.raises(ValueError, match="has no do_resize"):
        processor(text="what", do_resize=False)
    embeddings = Compressed(compressed.host, compressed.model, "embeddings")
    with pytest.raises(ValueError, match="among inputs_embeds"):
        CompressedProcessor(embeddings)
    fusing = compress(compressed.model, compressed.host.processor, "framefusion", FRAMES, budget=0.8)
    with pytest.raises(ValueError, match="'framefusion' works between the layers"):
        CompressedProcessor(fusing)
    assert processor.apply_chat_template(chat(frames())) == f"{compressed.placeholder} what why "
