"""UMT's question answering: training loss, rankings against brute force, generated answers, weights in and out."""

from __future__ import annotations

import json
import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tasks import umt_qa_runs
from tasks.umt_qa_runs import END, FRAMES, OPTIONS, START, VOCABULARY, make_batch, texts, tiny
from torch import Tensor
from towers import tempme_schedule, tiny_frontend
from training.processes import run

from tempme_vl import MergeSchedule, VisualFrontend
from tempme_vl.backbones.umt import to_umt_names
from tempme_vl.tasks.umt_qa import Ranking, UMTQAModel, create_umt_qa_model
from tempme_vl.text import bert_to_umt, decoder_to_umt

QUESTION = ("video", "frame_mask", "question_ids", "question_mask")
LIST = texts((3, 4, 3, 5, 3, 4, 5, 3, 4, 3), 5, 7, end=True)


def loss_of(model: UMTQAModel, batch: dict[str, Tensor], seed: int = 0) -> Tensor:
    torch.manual_seed(seed)
    return model.loss(model(batch), batch)


@torch.no_grad()
def asked(model: UMTQAModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States and mask of the questions."""
    return model({key: batch[key] for key in QUESTION})["states"], batch["question_mask"]


@torch.no_grad()
def likelihoods(model: UMTQAModel, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(Q, A): log p of every answer of the list and of its first word, each by itself, from the definition."""
    ids, answer_mask = LIST
    whole, first = torch.zeros(len(states), len(ids)), torch.zeros(len(states), len(ids))
    for q in range(len(states)):
        question = model.decoder.keys_values(states[q : q + 1], mask[q : q + 1])
        for a in range(len(ids)):
            words = ids[a, : int(answer_mask[a].sum())]
            log_p = model.decoder(words[None, None], question)[0, 0].log_softmax(-1)
            each = log_p[torch.arange(len(words) - 1), words[1:]]
            whole[q, a], first[q, a] = each.sum(), each[0]
    return whole, first


# ---- training


@pytest.mark.parametrize(("method", "mode"), [("tempme", "clip"), ("tome", "joint"), ("none", "clip")])
def test_features(method: str, mode: str) -> None:
    model, batch = tiny(method, mode).eval(), make_batch()
    tokens = model.encode_video(batch["video"], batch["frame_mask"])
    output = model.frontend(batch["video"], batch["frame_mask"])
    assert tokens.shape == (4, model.frontend.schedule.output_tokens, 64)
    assert torch.equal(tokens, model.frontend.norm(output.tokens)), "normed, as UMT's fusion has them"
    features = model(batch)
    assert features["states"].shape == (4, 7, 48) and features["answer_loss"].shape == (5,)
    assert torch.equal(model({key: batch[key] for key in QUESTION})["states"], features["states"])
    states = model.encode_question(batch["question_ids"], batch["question_mask"], model.keys_values(tokens))
    assert torch.equal(states, features["states"])


def test_questions_about_the_tokens_of_clip() -> None:
    """Any front end will do, its CLS tokens among the video's."""
    frontend, umt = tiny_frontend(tempme_schedule(FRAMES)), tiny()
    assert frontend.shape.width == umt.frontend.shape.width
    model = UMTQAModel(frontend, umt.text, umt.fusion, umt.decoder, VOCABULARY)
    batch = make_batch()
    tokens = model.encode_video(batch["video"])
    assert tokens.shape[1] == frontend.schedule.output_tokens
    loss_of(model, batch).backward()
    for name, parameter in model.frontend.named_parameters():
        assert (parameter.grad is None) == name.startswith("head."), name


def test_loss_is_the_weighted_sum_over_the_number_of_questions() -> None:
    model, batch = tiny().eval(), make_batch()
    features = model(batch)
    for answer, row in enumerate(batch["answer_row"]):
        question = {key: batch[key][row][None] for key in QUESTION}
        alone = {key: batch[key][answer][None] for key in ("answer_ids", "answer_mask")}
        torch.testing.assert_close(model(question | alone)["answer_loss"][0], features["answer_loss"][answer])
    expected = (features["answer_loss"] * batch["answer_weight"]).sum() / 4
    torch.testing.assert_close(model.loss(features, batch), expected)
    del batch["answer_weight"]
    torch.testing.assert_close(model.loss(features, batch), features["answer_loss"].sum() / 4)


def test_padding_and_order_do_not_matter() -> None:
    model, batch = tiny().eval(), make_batch()
    expected = model(batch)["answer_loss"]
    wider = {key: torch.nn.functional.pad(v, (0, 3)) for key, v in batch.items() if key.endswith(("_ids", "n_mask"))}
    wider["answer_mask"] = torch.nn.functional.pad(batch["answer_mask"], (0, 3))
    torch.testing.assert_close(model(batch | wider)["answer_loss"], expected)
    noisy = {"question_ids": batch["question_ids"].where(batch["question_mask"].bool(), 9)}
    torch.testing.assert_close(model(batch | noisy)["answer_loss"], expected)
    order = torch.tensor([3, 0, 4, 2, 1])
    shuffled = {key: value[order] for key, value in batch.items() if key.startswith("answer_")}
    torch.testing.assert_close(model(batch | shuffled)["answer_loss"], expected[order])


@pytest.mark.parametrize("content", [0.0, torch.nan])
def test_unreadable_videos_have_no_influence(content: float) -> None:
    model, batch = tiny().eval(), make_batch()
    batch["valid"] = torch.tensor([1.0, 0, 1, 1])
    loss_of(model, batch).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    features = model(batch)
    kept = torch.tensor([0, 3, 4])
    torch.testing.assert_close(model.loss(features, batch), features["answer_loss"][kept].sum() / 3)
    model.zero_grad()
    batch["video"][1] = content
    loss_of(model, batch).backward()
    for name, gradient in expected.items():
        assert gradient.isfinite().all() and torch.equal(dict(model.named_parameters())[name].grad, gradient), name
    batch["valid"] = torch.zeros(4)
    assert loss_of(model, batch) == 0


@pytest.mark.parametrize("method", ["tempme", "none"])
def test_every_parameter_learns_and_checkpointing_is_exact(method: str) -> None:
    """In training, with dropped paths; of the keys' biases in BERT only rounding is left (softmax)."""
    plain, batch = tiny(method, drop_path=0.3).train(), make_batch()
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    losses = [loss_of(model, batch) for model in (plain, checkpointed)]
    assert torch.equal(*losses) and not torch.equal(losses[0], loss_of(plain, batch, seed=1))
    for loss in losses:
        loss.backward()
    frozen = {name for name, p in plain.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in plain.named_parameters() if name.startswith("frontend.head.")} != set()
    for (name, a), b in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        if name in frozen:
            assert a.grad is None and b.grad is None
        else:
            assert torch.equal(a.grad, b.grad), name
            assert a.grad.abs().max() > 1e-8 or name.endswith(".self.key.bias"), name


def test_checkpointing_reaches_all_parts() -> None:
    model, batch, calls = tiny().train(), make_batch(), []
    texts_seen = [part.layers[0].intermediate for part in (model.text, model.fusion, model.decoder)]
    for part in (model.frontend.blocks[0].block.attn, *texts_seen):
        part.register_forward_hook(lambda *_: calls.append(1))
    for enable, expected in ((False, 4), (True, 8)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        loss_of(model, batch).backward()
        assert len(calls) == expected


def test_loss_of_two_ranks_is_that_of_the_whole_batch() -> None:
    """One rank holds two readable videos, the other one."""
    (whole,) = run(umt_qa_runs.loss_and_gradient)
    for part in run(umt_qa_runs.loss_and_gradient, world=2):
        assert part.keys() == whole.keys()
        for name, value in whole.items():
            torch.testing.assert_close(part[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_half_precision() -> None:
    model, batch = tiny().eval(), make_batch()
    expected = loss_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch)
        ranking = model.rank(*asked(model, batch), *LIST)
    assert loss.dtype == ranking.probabilities.dtype == torch.float32
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_answers_are_learned_then_ranked_first_and_generated() -> None:
    """The same question about four videos: only the video tells the answer."""
    model, batch = tiny().eval(), make_batch()
    ids, mask = texts((3, 4, 3, 4), 5, 8, end=True)
    batch = {key: batch[key] for key in (*QUESTION, "valid")} | {"answer_ids": ids, "answer_mask": mask}
    for key in ("question_ids", "question_mask"):
        batch[key] = batch[key][1].expand(4, -1)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss_of(model, batch, step).backward()
        optimizer.step()
    states, question_mask = asked(model, batch)
    answers, answer_mask = torch.cat([LIST[0], ids]), torch.cat([LIST[1], mask])
    for rule in ("likelihood", "umt"):
        ranking = model.rank(states, question_mask, answers, answer_mask, rule=rule)
        assert (ranking.answers[:, 0] - len(LIST[0])).tolist() == [0, 1, 2, 3]
        assert (ranking.probabilities[:, 0] > 0.8).all()
    spoken = [" ".join(VOCABULARY[n] for n in row if n > END).replace(" ##", "") for row in ids.tolist()]
    assert model.generate(states, question_mask) == spoken


# ---- ranking


@pytest.mark.parametrize("rule", ["likelihood", "umt"])
def test_ranking_the_whole_list_equals_brute_force(rule: Any) -> None:
    model, batch = tiny().eval(), make_batch()
    states, mask = asked(model, batch)
    whole, first = likelihoods(model, states, mask)
    score = whole + first if rule == "umt" else whole
    ranking = model.rank(states, mask, *LIST, candidates=10, rule=rule)
    assert torch.equal(ranking.answers, score.argsort(dim=1, descending=True))
    expected = score.softmax(1).gather(1, ranking.answers)
    torch.testing.assert_close(ranking.probabilities, expected, rtol=1e-4, atol=1e-6)
    assert_same(model.rank(states, mask, *LIST, candidates=128, rule=rule), ranking)


def test_candidates_are_those_of_the_likeliest_first_words() -> None:
    model, batch = tiny().eval(), make_batch()
    states, mask = asked(model, batch)
    whole, first = likelihoods(model, states, mask)
    for candidates in (1, 3, 7):
        chosen = first.argsort(dim=1, descending=True, stable=True)[:, :candidates]
        ranking = model.rank(states, mask, *LIST, candidates=candidates)
        assert torch.equal(ranking.answers.sort(dim=1).values, chosen.sort(dim=1).values)
        order = whole.gather(1, chosen).argsort(dim=1, descending=True)
        assert torch.equal(ranking.answers, chosen.gather(1, order))
        torch.testing.assert_close(ranking.probabilities.sum(1), torch.ones(4))


def test_the_rules_differ() -> None:
    """A first word that is likely in itself counts twice under UMT's rule."""
    model, batch = tiny().eval(), make_batch()
    states, mask = asked(model, batch)
    plain = model.rank(states, mask, *LIST)
    assert_same(model.rank(states, mask, *LIST, rule="likelihood"), plain)
    assert not torch.equal(model.rank(states, mask, *LIST, rule="umt").answers, plain.answers)


def test_ties_go_to_the_earlier_answer() -> None:
    model, batch = tiny().eval(), make_batch()
    ids, mask = (torch.cat([part[:1]] * 6) for part in LIST)
    ranking = model.rank(*asked(model, batch), ids, mask, candidates=4)
    assert ranking.answers.tolist() == [[0, 1, 2, 3]] * 4
    torch.testing.assert_close(ranking.probabilities, torch.full((4, 4), 0.25))


@pytest.mark.parametrize("rows", [1, 8, 13, 1000])
def test_ranking_in_parts_and_question_by_question(rows: int) -> None:
    model, batch = tiny().eval(), make_batch()
    states, mask = asked(model, batch)
    expected = model.rank(states, mask, *LIST, candidates=7)
    decoded: list[int] = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0][..., 0].numel()))
    assert_same(model.rank(states, mask, *LIST, candidates=7, rows=rows), expected)
    assert max(decoded) <= max(rows, 4) and sum(decoded) == 4 + 4 * 7
    for q in range(4):
        one = slice(q, q + 1)
        assert_same(
            model.rank(states[one], mask[one], *LIST, candidates=7, rows=rows),
            Ranking(expected.answers[one], expected.probabilities[one]),
        )


def assert_same(actual: Ranking, expected: Ranking) -> None:
    assert torch.equal(actual.answers, expected.answers)
    torch.testing.assert_close(actual.probabilities, expected.probabilities)


def test_a_video_is_encoded_once_for_all_its_questions() -> None:
    model, batch = tiny().eval(), make_batch()
    rows = torch.tensor([1, 1, 3, 1])
    keys = model.keys_values(model.encode_video(batch["video"], batch["frame_mask"]))
    states = model.encode_question(batch["question_ids"], batch["question_mask"], keys.select(rows))
    expected = asked(model, batch | {"video": batch["video"][rows]})[0]
    torch.testing.assert_close(states, expected)


def test_rankings_that_cannot_be() -> None:
    model, batch = tiny().eval(), make_batch()
    states, mask = asked(model, batch)
    ids, answer_mask = LIST
    with pytest.raises(ValueError, match="expected one of the rules likelihood, umt; got 'blip'"):
        model.rank(states, mask, ids, answer_mask, rule="blip")  # type: ignore[arg-type]
    for bad in ((ids, answer_mask, 0), (ids[:0], answer_mask[:0], 1), (ids, answer_mask[1:], 1)):
        with pytest.raises(ValueError, match=r"expected answers \(A, L\) with a mask alike, at least one"):
            model.rank(states, mask, *bad)
    wordless = answer_mask * torch.tensor([1, 0, 0, 0, 0])
    for bad_ids, bad_mask in ((ids, wordless), (ids[:, :1], answer_mask[:, :1])):
        with pytest.raises(ValueError, match="some of these have none"):
            model.rank(states, mask, bad_ids, bad_mask)


# ---- generation


def test_generated_texts() -> None:
    model, batch = tiny().eval(), make_batch()
    states, mask = asked(model, batch)
    ids = model.decoder.generate(model.decoder.keys_values(states, mask), START, END, 6).tolist()
    rows = [row[: row.index(END)] if END in row else row for row in ids]
    spoken = [" ".join(VOCABULARY[number] for number in row).replace(" ##", "") for row in rows]
    assert model.generate(states, mask, max_words=6) == spoken and any(spoken)
    assert [len(text.split()) <= 4 for text in model.generate(states, mask)] == [True] * 4, "as in training, 4 words"
    with torch.no_grad():
        model.decoder.head.bias[END] = 1e4
    assert model.generate(states, mask) == [""] * 4


def test_pieces_of_words_are_joined() -> None:
    model, batch = tiny().eval(), make_batch()
    with torch.no_grad():
        model.decoder.head.bias[VOCABULARY.index("##s")] = 1e4
    states, mask = asked(model, batch)
    assert model.generate(states, mask, 2) == ["##ss"] * 4
    model.vocabulary = ()
    with pytest.raises(ValueError, match=r"expected a vocabulary of 30 words, \[CLS\] and \[SEP\] among them; got 0"):
        model.generate(states, mask)


# ---- folders


@pytest.mark.parametrize("mode", ["clip", "joint"])
def test_saved_model_comes_back(mode: str, tmp_path: Path) -> None:
    saved, batch = tiny("tome", mode, layers=3).eval(), make_batch()
    saved.config["input"]["max_words"] = 17
    # line separators of Unicode are word pieces of BERT too
    saved.vocabulary = (*VOCABULARY[:-3], "\u2028", "\x85", "é")
    saved.save_pretrained(tmp_path)
    loaded = UMTQAModel.from_pretrained(tmp_path).eval()
    assert loaded.vocabulary == saved.vocabulary and loaded.config["input"] == saved.config["input"]
    assert loaded.text.shape == saved.text.shape and not any(p.requires_grad for p in loaded.frontend.head.parameters())
    expected, actual = saved(batch), loaded(batch)
    assert all(torch.equal(actual[key], value) for key, value in expected.items())
    frontend = VisualFrontend.from_pretrained(tmp_path)
    assert torch.equal(frontend(batch["video"]).tokens, saved.frontend(batch["video"]).tokens)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "vocab.txt", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / name).read_bytes()


def test_weights_can_be_given(tmp_path: Path) -> None:
    model = tiny()
    doubled = {key: 2 * value for key, value in model.state_dict().items()}
    model.save_pretrained(tmp_path, doubled)
    loaded = UMTQAModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == doubled.keys() and all(torch.equal(loaded[key], value) for key, value in doubled.items())


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").unlink()
    with pytest.raises(ValueError, match=r"expected the words of the model in .*vocab.txt, one a line"):
        UMTQAModel.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "kind": "umt_retrieval"}))
    with pytest.raises(ValueError, match=r"expected a UMT QA model in .*; got one of kind 'umt_retrieval'"):
        UMTQAModel.from_pretrained(tmp_path)
    tiny().save_pretrained(tmp_path)
    state = {key: value for key, value in tiny().state_dict().items() if key != "decoder.head.bias"}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"(?s)do not fit its config.json: .*decoder.head.bias"):
        UMTQAModel.from_pretrained(tmp_path)


# ---- public checkpoints


def public(model: UMTQAModel) -> dict[str, Tensor]:
    """Its weights under the names of UMT's files, in the QA form, the tied projection included."""
    vision = to_umt_names(model.frontend.state_dict())
    state = {f"vision_encoder.{key}": value for key, value in vision.items() if key.startswith("encoder.")}
    state |= {f"text_encoder.{key}": value for key, value in bert_to_umt(model.text, model.fusion).items()}
    state |= {f"text_decoder.{key}": value for key, value in decoder_to_umt(model.decoder).items()}
    state["text_decoder.cls.predictions.decoder.weight"] = model.decoder.embeddings.word_embeddings.weight
    state["text_decoder.cls.predictions.decoder.bias"] = model.decoder.head.bias
    return {key: value.detach().clone() for key, value in state.items()}


def pretraining(model: UMTQAModel) -> dict[str, Tensor]:
    """The same before fine-tuning: "bert." within the text encoder, which has the language head; no decoder."""
    state = {k.replace("text_encoder.", "text_encoder.bert."): v for k, v in public(model).items()}
    for key in [key for key in state if key.startswith("text_decoder.")]:
        value = state.pop(key)
        if ".cls." in key and not key.endswith("decoder.weight"):
            state[key.replace("text_decoder.", "text_encoder.")] = value
    return state


def create(file: Path, **changes: Any) -> UMTQAModel:
    options: dict[str, Any] = {"vocabulary": VOCABULARY, "method": "none", "num_frames": FRAMES, **changes}
    return create_umt_qa_model("umt:tiny", pretrained=str(file), **options)


def direct(state: dict[str, Tensor]) -> UMTQAModel:
    return UMTQAModel.from_umt_state_dict(state, 4, 4, 32, "clip", MergeSchedule.identity(6, 6, 16, 0), VOCABULARY)


def other_weights(method: str = "none", layers: int = 1) -> UMTQAModel:
    """As a checkpoint would be, no weight as it starts; of the sizes of "umt:tiny"."""
    torch.manual_seed(5)
    options = OPTIONS if method == "tempme" else {}
    model = create_umt_qa_model("umt:tiny", VOCABULARY, None, method, FRAMES, **options)
    model.decoder = type(model.decoder)(model.text.shape, layers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def test_qa_file_loads_every_part(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source, batch = other_weights(), make_batch()
    torch.save({"model": public(source)}, tmp_path / "umt.pth")
    with caplog.at_level(logging.INFO, "tempme_vl"):
        created = create(tmp_path / "umt.pth").eval()
    assert "of the qa form, converted to qa" in caplog.text and "0 missing" in caplog.text
    for model in (created, direct(public(source)).eval()):
        assert model.vocabulary == VOCABULARY
        assert torch.equal(model(batch)["answer_loss"], source(batch)["answer_loss"])


def test_decoders_may_be_deeper_than_the_fusion() -> None:
    source, batch = other_weights(layers=3), make_batch()
    model = direct(public(source)).eval()
    assert len(model.decoder.layers) == 3 and len(model.fusion.layers) == 1
    assert torch.equal(model(batch)["answer_loss"], source(batch)["answer_loss"])


def test_pretraining_file_starts_the_decoder_from_the_fusion(tmp_path: Path) -> None:
    source = other_weights()
    save_file(pretraining(source), tmp_path / "umt.safetensors")
    for model in (create(tmp_path / "umt.safetensors"), direct(pretraining(source))):
        decoder, fusion = model.decoder.state_dict(), model.fusion.state_dict()
        assert all(torch.equal(decoder[key], value) for key, value in fusion.items())
        assert all(torch.equal(v, source.fusion.state_dict()[key]) for key, v in fusion.items())
        words = "embeddings.word_embeddings.weight"
        assert torch.equal(decoder[words], source.text.state_dict()[words])
        assert torch.equal(decoder["head.dense.weight"], source.decoder.head.dense.weight)


def test_vision_file_leaves_the_text_side_at_random(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = other_weights("tempme")
    stage1 = {k: v for k, v in to_umt_names(source.frontend.state_dict()).items() if k.startswith("encoder.")}
    torch.save(stage1, tmp_path / "stage1.pth")
    with caplog.at_level(logging.INFO, "tempme_vl"):
        model = create(tmp_path / "stage1.pth", method="tempme", **OPTIONS)
    assert "text_encoder.*" in caplog.text and "text_decoder.bert.*" in caplog.text
    loaded, theirs = model.state_dict(), source.state_dict()
    same = {key for key, value in theirs.items() if torch.equal(loaded[key], value)}
    visual = {key for key in theirs if key.startswith("frontend.") and ".head." not in key and "position" not in key}
    assert same == visual
    with pytest.raises(ValueError, match=r"not the weights of UMT's question answering: .*'text_encoder\.\*'"):
        direct(stage1)


@pytest.mark.parametrize(
    ("drop", "add", "message"),
    [
        ("text_decoder.cls.predictions.bias", {}, r"\['text_decoder.cls.predictions.bias'\] are missing"),
        ("text_decoder.bert.encoder.layer.0.output.dense.bias", {}, r"layer.0.output.dense.bias'\] are missing"),
        ("", {"mlm_head.weight": (2, 2)}, r"\['mlm_head.weight'\] unknown"),
        ("", {"text_decoder.cls.predictions.decoder.weight": (30, 64)}, "these weights are others"),
        ("", {"text_decoder.cls.predictions.transform.dense.weight": (9, 9)}, "do not fit the decoder"),
    ],
)
def test_weights_that_do_not_fit(drop: str, add: dict[str, tuple[int, ...]], message: str) -> None:
    state: dict[str, Any] = {key: value for key, value in public(other_weights()).items() if key != drop}
    state |= {key: torch.zeros(shape) for key, shape in add.items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        direct(state)


def test_names_vocabularies_and_depths_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "umt.pth"
    torch.save(public(other_weights()), file)
    with pytest.raises(ValueError, match=r"text side is .*vocab_size=30,.*; the model wants .*vocab_size=29,"):
        create(file, vocabulary=VOCABULARY[:-1])
    torch.save(public(other_weights(layers=2)), file)
    with pytest.raises(ValueError, match=r"a decoder of 1 layers has no such weights: .*layer.1"):
        create(file)
    with pytest.raises(ValueError, match=r"expected one of UMT's models, such as 'umt:b16'; got 'open_clip:ViT-B-32'"):
        create_umt_qa_model("open_clip:ViT-B-32", VOCABULARY, None, "none")
