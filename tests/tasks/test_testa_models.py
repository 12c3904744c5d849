"""TESTA's models: training with momentum and a queue, public files, folders, answers and captions."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tempme_vl import VideoRetrieval, create_frontend
from tempme_vl.evaluation.rerank import second_stage
from tempme_vl.tasks.qa.create import create_qa_model
from tempme_vl.tasks.qa.model import load_qa_model
from tempme_vl.tasks.qa.question import BlipQuestions
from tempme_vl.tasks.qa.zero_shot import ZeroShotQA
from tempme_vl.tasks.retrieval import create_retrieval_model, load_retrieval_model
from tempme_vl.tasks.testa import (
    TestaCaptioner,
    TestaPretrainingModel,
    TestaRetrievalModel,
    create_testa_pretraining_model,
    create_testa_retrieval_model,
)
from tempme_vl.tasks.testa.contrast import FeatureQueue, Sides, ramp
from tempme_vl.tasks.testa.model import ContrastOptions
from tempme_vl.tasks.testa.public import load_public, to_public
from tempme_vl.text import BertDecoder, BlipShape, BlipTextEncoder, blip_vocabulary
from tempme_vl.text.beams import Writing, write
from tempme_vl.text.blip import tie
from tempme_vl.text.tokenizers import BlipWords, clean_caption, clean_question, word_vocabulary

TEXTS = ("a red ball moves left", "two dogs run", "a man, a hat", "the blue cube jumps")
WORDS = word_vocabulary(TEXTS)
FRAMES, SMALL = 4, {"temporal_r": [1, 0, 0, 0, 0, 0], "spatial_r": 1}


def model_of(queue: int = 8, tuning: str = "full", **options: object) -> TestaRetrievalModel:
    torch.manual_seed(0)
    given = {"method": "testa", "num_frames": FRAMES, "vocabulary": WORDS, "tuning": tuning, **SMALL, **options}
    model = create_retrieval_model("testa:tiny", queue=queue, **given)
    assert isinstance(model, TestaRetrievalModel)
    return model


def batch_of(seed: int = 1) -> dict[str, Tensor]:
    tokenize = BlipWords(blip_vocabulary(WORDS)).tokenizer(8)
    ids, masks = zip(*map(tokenize, TEXTS), strict=True)
    video = torch.randn(4, FRAMES, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {
        "video": video,
        "frame_mask": torch.ones(4, FRAMES),
        "text_ids": torch.stack(ids),
        "text_mask": torch.stack(masks),
        "video_id": torch.arange(4),
        "text_id": torch.arange(4),
        "valid": torch.ones(4),
    }


def step(model: TestaRetrievalModel, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor]) -> float:
    optimizer.zero_grad()
    loss = model.loss(model(batch), batch)
    loss.backward()
    optimizer.step()
    return loss.item()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def test_texts_end_and_keep_their_end_when_they_are_cut() -> None:
    words = blip_vocabulary(WORDS)
    tokenize = BlipWords(words).tokenizer(5)
    read = [[words[n] for n in tokenize(text)[0]] for text in ("Two dogs!", "a red ball moves left")]
    assert read == [["[CLS]", "two", "dogs", "[SEP]", "[PAD]"], ["[CLS]", "a", "red", "ball", "[SEP]"]]
    assert words[-2:] == ("[DEC]", "[ENC]") and blip_vocabulary(words) == words
    with pytest.raises(ValueError, match=r"expected \[DEC\] and \[ENC\] as the last two words"):
        blip_vocabulary(("[ENC]", *WORDS))


def test_training_lowers_the_loss_and_goes_on_bit_for_bit() -> None:
    model, batch = model_of(distill=0.0).train(), batch_of()
    optimizer = optimizer_of(model)
    losses = [step(model, optimizer, batch) for _ in range(16)]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert int(model.queue.place) == 0 and model.queue.ids.tolist() == [[0, 1, 2, 3] * 2]
    again = model_of(distill=0.0).train()
    again.load_state_dict(model.state_dict())
    other = optimizer_of(again)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    results = []
    for one, its in ((model, optimizer), (again, other)):
        torch.manual_seed(5)
        results.append([step(one, its, batch) for _ in range(2)])
    assert results[0] == results[1]


def test_copies_follow_slowly_and_do_not_train() -> None:
    model = model_of(momentum=0.75).train()
    weight, followed = model.text_proj.weight, model.momentum.copies["text_proj"].weight
    assert torch.equal(weight, followed) and not any(p.requires_grad for p in model.momentum.parameters())
    with torch.no_grad():
        weight.add_(1.0)
    before = followed.clone()
    model(batch_of())
    torch.testing.assert_close(followed - before, torch.full_like(followed, 0.25))
    model.eval()(batch_of())
    torch.testing.assert_close(followed - before, torch.full_like(followed, 0.25))


def test_an_unreadable_video_does_not_spread() -> None:
    model, batch = model_of().train(), batch_of()
    batch["video"][2] = torch.nan
    batch["valid"][2] = 0
    features = model(batch)
    assert features["match_valid"].tolist()[2::4] == [False] * 3
    loss = model.loss(features, batch)
    loss.backward()
    assert loss.isfinite() and all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert model.queue.video[:, :4].isfinite().all()


def test_pairs_of_one_video_are_positives_and_no_negatives() -> None:
    model, batch = model_of().train(), batch_of()
    batch["video_id"] = torch.tensor([7, 7, 1, 2])
    features = model(batch)
    model.queue.ids[0, 3] = 2
    model.distill = 0.0
    labels = model.contrast(features, batch).targets.video
    assert labels.shape == (4, 12)
    assert labels[0].nonzero().flatten().tolist() == [0, 1] and labels[0, 0] == 0.5
    assert labels[3].nonzero().flatten().tolist() == [3, 7]
    weights = model.negatives(features, batch)[0]
    assert weights[0, 1] == weights[1, 0] == 0 and (weights[2, [0, 1, 3]] > 0).all()


def test_how_much_is_distilled() -> None:
    assert [ramp(0, s, 4) for s in range(4)] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [ramp(e, 2, 4, 2) for e in range(3)] == pytest.approx([0.1, 0.3, 0.4])


def test_a_queue_takes_whole_steps_alone() -> None:
    queue = FeatureQueue(3, 6)
    with pytest.raises(ValueError, match="a multiple of 4 places, the pairs of a step; it has 6"):
        queue.put(Sides(torch.ones(4, 3), torch.ones(4, 3)), torch.arange(4))
    with pytest.raises(ValueError, match="create the model with `training` options"):
        frontend = create_frontend("testa:tiny", method="none", num_frames=FRAMES)
        text = BlipTextEncoder(BlipShape.named("tiny", vocab_size=len(WORDS) + 2))
        model = TestaRetrievalModel(frontend, text, blip_vocabulary(WORDS))
        model.loss(model(batch_of()), batch_of())


@torch.no_grad()
def test_a_folder_holds_what_answers_need(tmp_path: Path) -> None:
    model = model_of().eval()
    model.save_pretrained(tmp_path)
    again = load_retrieval_model(tmp_path).eval()
    assert isinstance(again, TestaRetrievalModel) and again.options is None
    for name in ("video", "text", "match"):
        torch.manual_seed(0)
        first = model(batch_of())[name]
        torch.manual_seed(0)
        assert torch.equal(again(batch_of())[name], first), name
    assert not any(key.startswith(("momentum.", "queue.")) for key in again.state_dict())
    started = model_of(pretrained=str(tmp_path))
    assert torch.equal(started.text.layers[1].output.dense.weight, model.text.layers[1].output.dense.weight)
    assert torch.equal(started.momentum.copies["text_proj"].weight, model.text_proj.weight)
    similarity = VideoRetrieval(again, timeout=None).encode_text(["a red ball"])
    assert similarity.shape == (1, 64)


@pytest.mark.parametrize("form", ["safetensors", "pth"])
def test_a_public_file_fills_a_model_and_is_written_again(form: str, tmp_path: Path) -> None:
    model = model_of().train()
    step(model, optimizer_of(model), batch_of())
    public, file = to_public(model), tmp_path / f"model.{form}"
    if form == "safetensors":
        save_file({name: value.clone().contiguous() for name, value in public.items()}, file)
    else:
        torch.save({"model": public, "config": {"k_test": 128}, "epoch": 3}, file)
    filled = model_of(pretrained=str(file))
    assert filled.state_dict().keys() == model.state_dict().keys()
    queue = {name for name in public if "queue" in name}
    assert len(queue) == 4
    for name, value in to_public(filled).items():
        assert name in queue or torch.equal(value, public[name]), name
    assert int(filled.queue.place) == 0 and int(public["ptr_queue"]) == 4
    converted = load_public(filled, public, queues=True)
    assert not converted.unused and not converted.missing
    assert all(torch.equal(value, public[name]) for name, value in to_public(filled).items())


def test_a_file_without_copies_starts_them_from_what_they_follow(tmp_path: Path) -> None:
    public = {name: value for name, value in to_public(model_of()).items() if "_m." not in name and "queue" not in name}
    torch.save({"model": public}, tmp_path / "ft.pth")
    model = model_of(pretrained=str(tmp_path / "ft.pth"))
    copies = model.momentum.copies
    assert torch.equal(copies["frontend"].head.weight, model.frontend.head.weight)
    assert torch.equal(
        copies["text"].layers[0].output.dense.weight, public["text_encoder.encoder.layer.0.output.dense.weight"]
    )


def test_files_of_others_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"encoder.weight": torch.ones(1)}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"expected a file of BLIP or TESTA, with keys such as visual_encoder\."):
        model_of(pretrained=str(tmp_path / "other.pth"))
    public = to_public(model_of())
    public["text_proj.weight"] = torch.ones(3, 3)
    torch.save({"model": public}, tmp_path / "wide.pth")
    with pytest.raises(ValueError, match=r"1 of other shapes: text_proj\.weight \(3, 3\) instead of \(64, 64\)"):
        model_of(pretrained=str(tmp_path / "wide.pth"))


def test_a_tuning_is_copied_too() -> None:
    model = model_of(tuning="lora").train()
    loss = step(model, optimizer_of(model), batch_of())
    assert math.isfinite(loss)
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert any(".lora_" in name for name in trained) and not any(name.startswith("momentum.") for name in trained)


@torch.no_grad()
def test_it_ranks_anew_and_answers_without_training() -> None:
    model = model_of().eval()
    assert second_stage(model) is model
    batch = batch_of()
    zero_shot = ZeroShotQA(model, ("red", "blue"))
    asked = zero_shot.tokenize("which ball")
    encoded = zero_shot({"video": batch["video"][:1], "frame_mask": batch["frame_mask"][:1]})
    answer = zero_shot({**encoded, **{name: value.unsqueeze(0) for name, value in asked.items()}})
    torch.testing.assert_close(answer["scores"].sum(), torch.tensor(1.0))


def test_pretraining_shares_layers_and_learns_captions() -> None:
    torch.manual_seed(0)
    frontend = create_frontend("testa:tiny", method="none", num_frames=FRAMES)
    shape = BlipShape.named("tiny", vocab_size=len(WORDS) + 2)
    model = TestaPretrainingModel(
        frontend, BlipTextEncoder(shape), blip_vocabulary(WORDS), training=ContrastOptions(8)
    ).train()
    layer, other = model.decoder.layers[1], model.text.layers[1]
    assert layer.crossattention is other.crossattention and layer.attention is not other.attention
    optimizer, batch, captions = optimizer_of(model), batch_of(), []
    for _ in range(10):
        optimizer.zero_grad()
        features = model(batch)
        model.loss(features, batch).backward()
        optimizer.step()
        captions.append(features["caption"].item())
    assert captions[-1] < 0.7 * captions[0] and int(model.queue.place) == 0
    names = to_public(model)
    assert "queue_ptr" in names and "idx_queue" not in names
    assert torch.equal(
        names["text_decoder.cls.predictions.decoder.weight"], model.text.embeddings.word_embeddings.weight
    )


def test_only_decoders_of_the_same_sizes_are_tied() -> None:
    shape = BlipShape.named("tiny")
    with pytest.raises(ValueError, match=r"a decoder of 2 layers of the widths \(64, 64\).*got 1 of \(64, 32\)"):
        tie(BertDecoder(shape, 1, 32), BlipTextEncoder(shape))


def test_a_captioner_learns_what_it_is_told() -> None:
    torch.manual_seed(0)
    frontend = create_frontend("testa:tiny", method="testa", num_frames=FRAMES, **SMALL)
    words = blip_vocabulary(word_vocabulary((*TEXTS, "a picture of")))
    model = TestaCaptioner(frontend, BlipShape.named("tiny", vocab_size=len(words)), words)
    tokenize = BlipWords(words).tokenizer(12)
    ids, masks = zip(*(tokenize(model.prompt + text) for text in TEXTS[:2]), strict=True)
    batch = {"video": batch_of()["video"][:2], "text_ids": torch.stack(ids), "text_mask": torch.stack(masks)}
    optimizer = optimizer_of(model)
    for _ in range(25):
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        tokens = model({"video": batch["video"]})["tokens"]
    for beams in (1, 3):
        writing = Writing(words.index("[SEP]"), 0, beams, 14)
        assert model.caption(tokens, writing) == list(TEXTS[:2])


def best_text(table: Tensor, most: int, end: int) -> list[int]:
    """Of all texts up to a length, by the sum of log-likelihoods over the length before the end."""
    likely, words = table.log_softmax(-1), table.shape[0]
    scored: list[tuple[float, list[int]]] = []
    for length in range(1, most):
        for text in itertools.product([w for w in range(words) if w != end], repeat=length):
            total = sum(likely[a, b].item() for a, b in itertools.pairwise((0, *text)))
            if length < most - 1:
                scored.append(((total + likely[text[-1], end].item()) / (length + 1), [0, *text, end]))
            else:
                scored.append((total / (length + 1), [0, *text]))
    return max(scored)[1]


@pytest.mark.parametrize("seed", range(4))
def test_enough_beams_find_the_best_text(seed: int) -> None:
    """Words follow each other by a table; the end is not allowed right away."""
    table = 2 * torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    writing = Writing(end=3, pad=0, beams=40, most=4, least=2)
    wide = torch.full((4, 21), -1e4, dtype=torch.float64)  # words that nothing leads to: 40 beams need so many
    wide[:, :4] = table

    def next_words(ids: Tensor) -> Tensor:
        return wide[ids[..., -1].clamp(max=3)]

    found = write(next_words, torch.zeros(1, 1, dtype=torch.int64), writing)[0].tolist()
    expected = best_text(wide[:4, :4], 4, 3)
    assert found[: len(expected)] == expected and not any(found[len(expected) :])


def test_what_cannot_be_written_is_refused() -> None:
    with pytest.raises(ValueError, match="expected beams and most of 1 or more"):
        Writing(end=3, beams=0)
    with pytest.raises(ValueError, match="a start of fewer than most=2 words; got 2"):
        write(lambda ids: ids, torch.zeros(1, 2, dtype=torch.int64), Writing(3, most=2))


def test_question_answering(tmp_path: Path) -> None:
    torch.manual_seed(0)
    options = {"method": "testa", "num_frames": FRAMES, "answers": ("red", "two dogs"), "answer_words": 6, **SMALL}
    model = create_qa_model("testa:tiny", WORDS, "decoder", **options)
    asked = [model.tokenize("a ball moves", "red"), model.tokenize("two dogs run", "two dogs")]
    batch = {name: torch.stack([one[name] for one in asked]) for name in asked[0]}
    batch |= {name: value[:2] for name, value in batch_of().items() if name in ("video", "frame_mask", "valid")}
    optimizer = optimizer_of(model)
    for _ in range(20):
        optimizer.zero_grad()
        model.loss(model(batch), batch).backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path)
    ask = {name: value for name, value in batch.items() if not name.startswith("answer_")}
    for one in (model, load_qa_model(tmp_path).eval()):
        found = one(ask)
        assert [one.text(row) for row in found["prediction"].tolist()] == ["red", "two dogs"]
    assert model.head.begun(batch["answer_ids"])[0, 0] == len(WORDS)
    free = create_qa_model("testa:tiny", WORDS, "decoder", pretrained=str(tmp_path), **{**options, "rule": "generate"})
    written = free.eval()(ask)
    assert [free.text(row) for row in written["prediction"].tolist()] == ["red", "two dogs"]
    with pytest.raises(ValueError, match=r"a tower of TESTA has BLIP's texts.*rule='umt'"):
        create_qa_model("testa:tiny", WORDS, "decoder", **{**options, "rule": "umt"})


# as the original cleans them, blanks aside
CLEANED = {
    "A man's dog (brown)  runs*fast!  ": ("a man's dog brown runs fast", "a man's dog brown runsfast"),
    "HELLO~World #1: what; is. this?": ("hello world 1: what; is. this?", "helloworld 1 what is this?"),
    'Don\'t "quote" me.': ("don't quote me.", "don't quote me"),
}


@pytest.mark.parametrize("text", CLEANED)
def test_captions_and_questions_are_cleaned_in_their_own_ways(text: str) -> None:
    assert (clean_caption(text), clean_question(text)) == CLEANED[text]
    words = blip_vocabulary(word_vocabulary(["is this 1. it"]))
    asked = BlipQuestions(BlipTextEncoder(BlipShape.named("tiny", vocab_size=len(words))), words, 6)
    read = [words[number] for number in asked.tokenize("Is this 1.")[0].tolist()]
    assert read == ["[CLS]", "is", "this", "1", "[SEP]", "[PAD]"]


def pretraining_of(pretrained: str | None = None, frames: int = FRAMES, **options: Any) -> TestaPretrainingModel:
    torch.manual_seed(0)
    training = ContrastOptions(8)
    return create_testa_pretraining_model("testa:tiny", WORDS, pretrained, "none", frames, training, **options)


def test_what_was_pre_trained_is_saved_and_starts_all_others(tmp_path: Path) -> None:
    model = pretraining_of(temporal_scaling=True).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    batch = batch_of()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert not any(name.startswith(("momentum.", "queue.", "decoder.embeddings.")) for name in names)
    loaded = TestaPretrainingModel.from_pretrained(tmp_path).eval()
    assert loaded.decoder.embeddings is loaded.text.embeddings and loaded.options is None
    with pytest.raises(ValueError, match="contrast wants momentum copies"):
        loaded(batch)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key

    again = pretraining_of(str(tmp_path), temporal_scaling=True).eval()
    with torch.no_grad():
        torch.manual_seed(1)
        first = again(batch)["caption"]
        assert torch.equal(again.momentum.copies["text_proj"].weight, again.text_proj.weight)
        model.reset_copies()
        torch.manual_seed(1)
        assert torch.equal(first, model(batch)["caption"])
    read = load_retrieval_model(tmp_path).eval()
    assert isinstance(read, TestaRetrievalModel)
    given = {name: batch[name] for name in ("text_ids", "text_mask")}
    with torch.no_grad():
        assert torch.equal(read(given)["text"], model.encode_text(batch["text_ids"], batch["text_mask"]))
        assert torch.equal(read.encode_video(batch["video"])[0], model.encode_video(batch["video"])[0])
    retrieval = create_testa_retrieval_model("testa:tiny", WORDS, str(tmp_path), "none", 2 * FRAMES)
    assert retrieval.frontend.schedule.frames == 2 * FRAMES
    assert not any(name.endswith("temporal_scaling") for name in retrieval.state_dict())
    assert torch.equal(retrieval.text_proj.weight, model.text_proj.weight)
    asked = create_qa_model("testa:tiny", WORDS, "decoder", ("red",), str(tmp_path), "none", FRAMES)
    assert torch.equal(
        asked.head.decoder.layers[1].attention.self.query.weight, model.decoder.layers[1].attention.self.query.weight
    )
    assert torch.equal(
        asked.head.questions.text.embeddings.word_embeddings.weight, model.text.embeddings.word_embeddings.weight
    )


def test_pre_training_starts_from_retrieval_without_factors_of_frames(tmp_path: Path) -> None:
    model = model_of()
    model.save_pretrained(tmp_path)
    started = pretraining_of(str(tmp_path), temporal_scaling=True)
    assert torch.equal(started.text_proj.weight, model.text_proj.weight)
    scales = [value for key, value in started.frontend.state_dict().items() if key.endswith("temporal_scaling")]
    assert len(scales) == 6 and not any(scale.any() for scale in scales)


def test_contrast_of_pre_training_is_that_of_retrieval_where_all_videos_differ() -> None:
    pretraining, retrieval = pretraining_of(), model_of()
    assert retrieval.queue.places == pretraining.queue.places
    pretraining.queue.video.copy_(retrieval.queue.video)
    pretraining.queue.text.copy_(retrieval.queue.text)
    torch.manual_seed(3)
    names = ("video", "text", "momentum_video", "momentum_text")
    features = {name: F.normalize(torch.randn(4, 64), dim=1) for name in names} | {"temperature": torch.tensor(0.07)}
    pretraining.distill = retrieval.distill = 0.3
    ours = pretraining.contrast(features)
    theirs = retrieval.contrast(features, {"video_id": torch.arange(4)})
    assert torch.equal(ours.loss(), theirs.loss())
    shared = retrieval.contrast(features, {"video_id": torch.tensor([0, 0, 1, 2])})
    assert not torch.equal(ours.loss(), shared.loss())
