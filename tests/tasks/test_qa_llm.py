"""The llm head: prompts, losses, written answers, options, what is trained, folders, precision, ranks, errors."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tasks import llm_models
from tasks.llm_models import (
    ANSWERS,
    DOINGS,
    FRAMES,
    OF_VIDEO,
    QUESTIONS,
    asked,
    encoded,
    learn,
    tiny_llm_qa,
    videos,
    write_llm,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from training.processes import run
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tempme_vl.manifest import write_manifest
from tempme_vl.tasks.qa import LLMHead, VideoQAModel, load_qa_model
from tempme_vl.tasks.qa.llm import PLACEHOLDER, load_llm, load_tokenizer
from tempme_vl.tuning import Lora

KINDS: dict[str, dict[str, Any]] = {"frozen": {}, "full": {"train_llm": True}, "lora": {"lora_rank": 4}}
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llm(tmp_path_factory.mktemp("llm"))


@pytest.fixture(scope="module")
def tied_llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large random weights, so that what it writes differs from prompt to prompt."""
    return write_llm(tmp_path_factory.mktemp("tied"), tied=True, initializer_range=0.3)


@pytest.fixture(scope="module")
def learned(llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that was trained on all QUESTIONS."""
    model = tiny_llm_qa(llm, train_llm=True)
    learn(model)
    folder = tmp_path_factory.mktemp("learned") / "model"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def expert(learned: Path) -> VideoQAModel:
    return load_qa_model(learned).eval()


@pytest.fixture
def random_writer(tied_llm: Path) -> VideoQAModel:
    return tiny_llm_qa(tied_llm).eval()


def rows_of(batch: dict[str, Tensor], rows: Any) -> dict[str, Tensor]:
    return {key: value[rows] for key, value in batch.items()}


@torch.no_grad()
def written(model: VideoQAModel, batch: dict[str, Tensor]) -> Tensor:
    return model(batch)["prediction"]


def train_batch(model: VideoQAModel, count: int = 4) -> dict[str, Tensor]:
    batch = {"video": videos()[OF_VIDEO[:count]], "frame_mask": torch.ones(count, FRAMES), "valid": torch.ones(count)}
    return batch | asked(model, range(count), trained=True)


def without_answers(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if not key.startswith("answer_")}


def loss_of(model: VideoQAModel, batch: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(0)
    return model.loss(model(batch), batch)


# ---- learning


def test_fifty_questions_are_learned(expert: VideoQAModel) -> None:
    predictions = written(expert, encoded(expert) | asked(expert, range(50)))
    assert tuple(expert.head.text(row) for row in predictions.tolist()) == ANSWERS
    assert predictions.shape == (50, expert.head.answer_words)


def test_learned_answers_are_the_likeliest_options(expert: VideoQAModel) -> None:
    batch = encoded(expert) | asked(expert, range(50), options=DOINGS)
    assert [DOINGS[row] for row in written(expert, batch).flatten().tolist()] == list(ANSWERS)


# ---- prompts


@pytest.mark.parametrize("method", ["tempme", "tome", "none"])
def test_the_prompt_has_a_place_for_each_token_of_the_schedule(llm: Path, method: str) -> None:
    model = tiny_llm_qa(llm, method).eval()
    count = model.frontend.schedule.output_tokens
    batch = asked(model, range(5))
    assert batch["question_ids"].eq(PLACEHOLDER).sum(1).eq(count).all()
    video = {"video": videos()[:5], "frame_mask": torch.ones(5, FRAMES)}
    with torch.no_grad():
        output = model(video | batch)
    assert output["tokens"].shape[1] == count and len(output["prediction"]) == 5
    fewer = {name: output[name][:, 1:] for name in model.kept}
    with pytest.raises(ValueError, match=rf"\[{count}\] visual tokens, but videos have {count - 1}"):
        model(fewer | batch)


def test_prompt_and_answer_are_the_pieces_of_sentencepiece(llm: Path) -> None:
    head = tiny_llm_qa(llm).head
    words = sentencepiece.SentencePieceProcessor(model_file=str(llm / "tokenizer.model"))
    for question, answer in zip(QUESTIONS[:5], ANSWERS, strict=False):
        row = head.tokenize(question, answer)
        ids = row["question_ids"][row["question_mask"].bool()].tolist()
        pieces = words.encode(f"Question: {question} Short answer:")
        assert ids == [words.bos_id(), *[PLACEHOLDER] * head.num_visual, *pieces]
        assert row["question_mask"].tolist() == sorted(row["question_mask"].tolist()), "padded on the left"
        ids = row["answer_ids"][row["answer_mask"].bool()].tolist()
        assert ids == [*words.encode(answer), words.eos_id()]
        assert row["answer_mask"].tolist() == sorted(row["answer_mask"].tolist(), reverse=True)
        assert head.text(row["answer_ids"].tolist()) == answer
    options = head.tokenize(QUESTIONS[0], options=DOINGS)
    assert options["option_ids"].shape == (len(DOINGS), head.answer_words)
    assert torch.equal(options["option_ids"][6], head.tokenize("", "red")["answer_ids"])


def test_long_questions_lose_their_end_and_nothing_else(llm: Path) -> None:
    head = tiny_llm_qa(llm).head
    row = head.tokenize("What is the dog " * 40 + "doing?")
    ids = row["question_ids"][row["question_mask"].bool()].tolist()
    assert ids.count(PLACEHOLDER) == head.num_visual and len(ids) <= len(row["question_ids"])
    text = head.tokenizer.decode(ids[1 + head.num_visual :])
    assert text.startswith("Question: What is the dog What") and text.endswith(" Short answer:")
    assert len(ids) > len(row["question_ids"]) - 8, "no more than needed"
    cut = head.tokenize("", "playing the piano " * 5)
    assert cut["answer_mask"].all() and head.tokenizer.eos_token_id not in cut["answer_ids"]
    head.max_words = 3
    with pytest.raises(ValueError, match="raise max_words, now 3"):
        head.tokenize("What?")


def test_answers_follow_as_the_tokenizer_has_words_inside_a_text(llm: Path) -> None:
    """Byte-level BPE (GPT, Qwen, Llama 3): a word after a space is another piece than one at the start."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"Short answer: {doing}" for doing in DOINGS] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
    head = LLMHead(load_llm(str(llm)), tokenizer, 64, 3)
    row = head.tokenize("What?", "far away")
    pieces = tokenizer.convert_ids_to_tokens(row["answer_ids"].tolist())
    assert pieces[0].startswith("Ġ") and head.text(row["answer_ids"].tolist()) == "far away"
    assert row["question_ids"][row["question_mask"].bool()].tolist()[:4].count(PLACEHOLDER) == 3, "no start token"
    head.template = "{question}\n"
    row = head.tokenize("What?", "far away")
    assert not tokenizer.convert_ids_to_tokens(row["answer_ids"].tolist())[0].startswith("Ġ")


# ---- losses and answers against their definition


@torch.no_grad()
def log_p(model: VideoQAModel, tokens: Tensor, row: dict[str, Tensor], words: list[int]) -> Tensor:
    """(len(words), vocabulary): of each of the words after one prompt, without padding, masks or positions."""
    head = model.head
    ids = row["question_ids"][row["question_mask"].bool()]
    embed = head.llm.get_input_embeddings()
    assert ids[0] == head.tokenizer.bos_token_id
    after = embed(ids[1 + head.num_visual :])
    parts = [embed(ids[:1]), head.projector(tokens), after, embed(torch.tensor(words, dtype=torch.int64))]
    logits = head.llm(inputs_embeds=torch.cat(parts)[None], use_cache=False).logits[0]
    return logits.log_softmax(-1)[-len(words) - 1 :]


def test_losses_are_those_of_each_answer_alone(random_writer: VideoQAModel) -> None:
    model, numbers = random_writer, [0, 7, 23, 44]
    kept, batch = rows_of(encoded(model), numbers), asked(model, numbers, trained=True)
    losses = model(kept | batch)["losses"]
    for i in range(4):
        words = batch["answer_ids"][i][batch["answer_mask"][i].bool()].tolist()
        each = log_p(model, kept["tokens"][i], rows_of(batch, i), words)
        torch.testing.assert_close(losses[i], -each[torch.arange(len(words)), words].sum())
    rows = torch.tensor([2, 0, 2, 3, 1])
    several = batch | {key: batch[key][rows] for key in ("answer_ids", "answer_mask")} | {"answer_row": rows}
    torch.testing.assert_close(model(kept | several)["losses"], losses[rows])


def test_answers_are_written_greedily(random_writer: VideoQAModel) -> None:
    """Whatever the published model's settings for generation are; this one's would punish repetitions."""
    model, numbers = random_writer, list(range(12))
    kept, batch = rows_of(encoded(model), numbers), asked(model, numbers)
    found = written(model, kept | batch)
    end = model.head.tokenizer.eos_token_id
    for i in numbers:
        words: list[int] = []
        while len(words) < model.head.answer_words and end not in words:
            words.append(int(log_p(model, kept["tokens"][i], rows_of(batch, i), words)[-1].argmax()))
        assert found[i].tolist() == words + [end] * (model.head.answer_words - len(words))
    assert len({tuple(row) for row in found.tolist()}) > 6


@pytest.mark.parametrize("who", ["expert", "random_writer"])
def test_batched_answers_equal_those_one_by_one(who: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(who)
    numbers = list(range(0, 50, 6))
    batch = rows_of(encoded(model), numbers) | asked(model, numbers)
    together = written(model, batch)
    assert batch["question_mask"].sum(1).unique().numel() > 1, "prompts of several lengths"
    alone = torch.cat([written(model, rows_of(batch, [i])) for i in range(len(numbers))])
    assert torch.equal(together, alone) and together.unique(dim=0).shape[0] > 4


@pytest.mark.parametrize("who", ["expert", "random_writer"])
def test_padding_changes_nothing(who: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(who)
    numbers = [*range(0, 50, 5), 2, 3]
    kept = rows_of(encoded(model), numbers)
    expected = written(model, kept | asked(model, numbers))
    losses = model(kept | asked(model, numbers, trained=True))["losses"]
    tight = asked(model, numbers)
    first = int(tight["question_mask"].argmax(1).min())
    assert torch.equal(written(model, kept | {key: value[:, first:] for key, value in tight.items()}), expected)
    model.head.max_words += 17  # padding on the left
    batch = asked(model, numbers, trained=True)
    batch["question_ids"] = batch["question_ids"].where(batch["question_mask"].bool(), 77)
    torch.testing.assert_close(model(kept | batch)["losses"], losses, atol=2e-5, rtol=1e-5)
    assert torch.equal(written(model, kept | asked(model, numbers)), expected)
    model.head.answer_words += 5  # and on the right
    batch = asked(model, numbers, trained=True)
    batch["answer_ids"] = batch["answer_ids"].where(batch["answer_mask"].bool(), 77)
    torch.testing.assert_close(model(kept | batch)["losses"], losses, atol=2e-5, rtol=1e-5)


def test_left_padded_prompts_have_the_positions_of_unpadded_ones(llm: Path) -> None:
    """A model with learned absolute positions (GPT-2) tells; rotary ones see differences of positions alone."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=400, n_positions=512, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    gpt = GPT2LMHeadModel(config).eval()
    torch.nn.init.normal_(gpt.transformer.wpe.weight, std=1.0)
    head = LLMHead(gpt, load_tokenizer(llm), 64, 13).eval()
    tokens, size = torch.randn(3, 13, 64), torch.ones(3, 13, 1)

    def rows(**options: Any) -> dict[str, Tensor]:
        asked = [head.tokenize(QUESTIONS[i], **{key: value[i] for key, value in options.items()}) for i in range(3)]
        return {key: torch.stack([one[key] for one in asked]) for key in asked[0]}

    learn, options = {"answer": ANSWERS[:3]}, {"options": [DOINGS] * 3}
    padded = [head(tokens, size, rows(**how)) for how in (learn, options, {})]
    for row in range(3):
        for how, found in zip((learn, options, {}), padded, strict=True):
            batch = {key: value[row : row + 1] for key, value in rows(**how).items()}
            first = int(batch["question_mask"][0].argmax())
            assert first > 10
            alone = {k: v[:, first:] if k.startswith("question_") else v for k, v in batch.items()}
            output = head(tokens[row : row + 1], size[row : row + 1], alone)
            assert output.keys() == found.keys()
            for key, value in output.items():
                torch.testing.assert_close(value, found[key][row : row + 1], rtol=0, atol=1e-4)


def test_options(random_writer: VideoQAModel) -> None:
    model, numbers = random_writer, [0, 1, 9, 33]
    kept = rows_of(encoded(model), numbers)
    batch = asked(model, numbers, options=DOINGS)
    losses = torch.stack(
        [model(kept | asked(model, numbers) | answer_to_all(model, doing, 4))["losses"] for doing in DOINGS], dim=1
    )
    chosen = written(model, kept | batch)
    assert torch.equal(chosen, losses.argmin(1, keepdim=True))
    valid = torch.ones(4, len(DOINGS), dtype=torch.int64).scatter(1, chosen, 0)
    second = losses.scatter(1, chosen, torch.inf).argmin(1, keepdim=True)
    assert torch.equal(written(model, kept | batch | {"option_valid": valid}), second)


def answer_to_all(model: VideoQAModel, answer: str, count: int) -> dict[str, Tensor]:
    row = model.head.tokenize("", answer)
    return {key: row[key].expand(count, -1) for key in ("answer_ids", "answer_mask")}


def test_scores_are_the_probabilities_of_what_was_written_and_shares_of_options(random_writer: VideoQAModel) -> None:
    """By the loss that training would have for these words, which generating has no part in."""
    model, numbers = random_writer, [0, 1, 9, 33]
    kept, asks = rows_of(encoded(model), numbers), asked(model, numbers)
    with torch.no_grad():
        said = model(kept | asks)
        ended = (said["prediction"] == model.head._end).cumsum(1)
        words = {"answer_ids": said["prediction"], "answer_mask": torch.cat([0 * ended[:, :1], ended[:, :-1]], 1) == 0}
        losses = model(kept | asks | {name: value.long() for name, value in words.items()})["losses"]
        chosen = model(kept | asked(model, numbers, options=DOINGS))["scores"]
        each = [model(kept | asks | answer_to_all(model, doing, 4))["losses"] for doing in DOINGS]
    torch.testing.assert_close(said["scores"], (-losses).exp().unsqueeze(1), rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(chosen, (-torch.stack(each, dim=1)).softmax(1), rtol=1e-3, atol=1e-6)


def test_answering_is_silent(expert: VideoQAModel, capfd: pytest.CaptureFixture[str]) -> None:
    kept = rows_of(encoded(expert), [0, 1])
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written(expert, kept | asked(expert, [0, 1]))
    assert capfd.readouterr() == ("", "")


# ---- training


@ALL_KINDS
def test_what_is_trained(llm: Path, kind: str) -> None:
    model = tiny_llm_qa(llm, **KINDS[kind])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    of_llm = {name for name, _ in model.named_parameters() if name.startswith("head.llm.")}
    expected = {"frozen": set(), "full": of_llm, "lora": {name for name in of_llm if ".lora_" in name}}[kind]
    assert {name for name in weights if name.startswith("head.llm.")} == expected
    assert (kind == "frozen") == (not expected)
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    for _ in range(2):  # LoRA's first factor learns once the second is not zero
        optimizer.zero_grad()
        loss_of(model, train_batch(model)).backward()
        optimizer.step()
    for name, p in model.named_parameters():
        assert p.requires_grad == (p.grad is not None and bool(p.grad.abs().sum() > 0)), name
        assert p.requires_grad != torch.equal(p, before[name]), name
    new = {name for name in weights if model.is_new_parameter(name)}
    merging = {name for name in weights if ".before_attention." in name}
    projector = {f"head.projector.{part}" for part in ("0.weight", "0.bias", "2.weight", "2.bias")}
    assert new == merging | projector | (expected if kind == "lora" else set()) and merging


@ALL_KINDS
def test_checkpointing_is_exact(llm: Path, kind: str) -> None:
    plain = tiny_llm_qa(llm, **KINDS[kind], **({"lora_dropout": 0.3} if kind == "lora" else {})).train()
    checkpointed = deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    assert any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.head.llm.modules())
    losses = [loss_of(model, train_batch(model)) for model in (plain, checkpointed)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(p.grad, q.grad)), name
    checkpointed.set_grad_checkpointing(False)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in checkpointed.head.llm.modules())


def test_half_precision(llm: Path) -> None:
    model = tiny_llm_qa(llm, train_llm=True)
    batch = train_batch(model)
    expected = loss_of(model, batch)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(model, batch)
        assert written(model, without_answers(batch)).shape == (4, 8)
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    half = tiny_llm_qa(llm, dtype="bfloat16")
    assert half.head.llm.dtype == torch.bfloat16 and half.head.projector[0].weight.dtype == torch.float32
    loss = loss_of(half, batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    rotary = {name: buffer.clone() for name, buffer in model.head.llm.named_buffers()}
    model.bfloat16()
    assert model.head.llm.dtype == torch.bfloat16 and rotary
    for name, buffer in model.head.llm.named_buffers():
        assert buffer.dtype == torch.float32 and torch.equal(buffer, rotary[name]), name
    batch["video"] = batch["video"].bfloat16()
    torch.testing.assert_close(loss_of(model, batch), expected, rtol=0.02, atol=0)
    assert written(model, without_answers(batch)).shape == (4, 8)


# ---- folders


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [False, True])
@ALL_KINDS
def test_saving_and_loading(
    llm: Path, tied_llm: Path, tmp_path: Path, kind: str, tied: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tied_llm if tied else llm
    monkeypatch.chdir(source.parent)
    model = tiny_llm_qa(Path(source.name), template="Q: {question} A:", answer_words=6, dtype=dtype, **KINDS[kind])
    with torch.no_grad():  # as after training
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p) * p.requires_grad
    model.save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    loaded = load_qa_model(tmp_path / "model").eval()
    expected, found = model.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert value.dtype == found[key].dtype and torch.equal(value, found[key]), key
    of_llm = loaded.head.llm
    assert (of_llm.get_input_embeddings().weight is of_llm.get_output_embeddings().weight) == tied
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in loaded.parameters()]
    batch = train_batch(model)
    assert torch.equal(loss_of(model.eval(), batch), loss_of(loaded, batch))
    assert torch.equal(written(model, without_answers(batch)), written(loaded, without_answers(batch)))
    assert (tmp_path / "model" / "llm" / "config.json").is_file() == (kind != "lora")
    assert (tmp_path / "model" / "tokenizer" / "tokenizer_config.json").is_file()
    assert not list((tmp_path / "model").rglob("*.bin"))
    loaded.save_pretrained(tmp_path / "again")
    same = load_file(tmp_path / "again" / "model.safetensors")
    for key, value in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(value, same.pop(key))
    assert not same


@ALL_KINDS
def test_lora_on_the_front_end_leaves_the_language_model_alone(llm: Path, tmp_path: Path, kind: str) -> None:
    plain, model = (tiny_llm_qa(llm, **KINDS[kind]) for _ in range(2))
    model.tune(Lora(2))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    before = {name for name, p in plain.named_parameters() if p.requires_grad}
    added = {name for name in trained if name.startswith("frontend.") and ".lora_" in name}
    positions = {name for name in before if "clip_position" in name}
    assert trained == {name for name in before if name.startswith("head.")} | positions | added and added and positions
    with torch.no_grad():  # as after training
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p) * p.requires_grad
    model.save_pretrained(tmp_path / "model")
    loaded = load_qa_model(tmp_path / "model").eval()
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == plain.state_dict().keys()
    for key in (key for key in found if key.startswith("head.")):
        assert torch.equal(found[key], expected[key]), key
    batch = train_batch(model)
    torch.testing.assert_close(loss_of(model.eval(), batch), loss_of(loaded, batch), rtol=0, atol=1e-5)


def test_the_adapter_is_peft_s_own_and_the_base_is_not_written(llm: Path, tmp_path: Path) -> None:
    model = tiny_llm_qa(llm, lora_rank=4).eval()
    state = {k: v + 0.1 if ".lora_" in k else v for k, v in model.state_dict().items()}  # as ZeRO's, of no module
    model.save_pretrained(tmp_path, state)
    assert not [key for key in load_file(tmp_path / "model.safetensors") if ".llm." in key]
    loaded = load_qa_model(tmp_path).eval()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    own = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llm), tmp_path / "adapter").eval()
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(own(ids).logits, loaded.head.llm(ids).logits)
        assert not torch.equal(own(ids).logits, model.head.llm(ids).logits)

    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    own_weights = load_file(adapter)
    weights = dict(own_weights)
    weights.pop(next(iter(weights)))
    save_file(weights, adapter, metadata={"format": "pt"})
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match="does not fit"):
        load_qa_model(tmp_path)
    adapter.unlink()
    with pytest.raises(ValueError, match="adapter"):
        load_qa_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head_config"]["source"] == str(llm.resolve())
    config["head_config"]["source"] = str(tmp_path / "gone")
    save_file(own_weights, adapter, metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_manifest(tmp_path)
    with pytest.raises(ValueError, match=r"could not load .*gone"):
        load_qa_model(tmp_path)


def test_lora_of_unknown_origin_is_not_saved(llm: Path, tmp_path: Path) -> None:
    head = LLMHead(Lora(4).wrap(load_llm(str(llm)), task="CAUSAL_LM"), load_tokenizer(llm), 64, 13)
    with pytest.raises(ValueError, match="source"):
        head.save(tmp_path, head.state_dict())


# ---- ranks


@pytest.mark.slow  # tests/recipes trains a language model's LoRA on two ranks at ZeRO-3
def test_ranks_that_share_the_weights(expert: VideoQAModel, learned: Path, tmp_path: Path) -> None:
    """ZeRO-3, answers of other lengths on each rank."""
    order = sorted(range(50), key=lambda i: len(ANSWERS[i]))
    shares = [order[:2], order[-3:]]
    results = run(llm_models.answer_and_train_partitioned, learned, tmp_path, shares, world=2)
    for share, result in zip(shares, results, strict=True):
        assert result["texts"] == [ANSWERS[i] for i in share]
    batch = train_batch(expert.train())
    loss = loss_of(expert, batch)
    torch.testing.assert_close(sum(result["loss"] for result in results) / 2, loss.detach(), atol=1e-6, rtol=1e-4)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(expert.parameters(), 1.0)
    exported = load_qa_model(tmp_path / "export").state_dict()
    moved = 0
    for name, p in expert.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(exported[name], p.detach() - 1e-2 * p.grad, atol=1e-6, rtol=1e-4)
            moved += int((p.grad != 0).any())
    assert moved > 30


# ---- errors


@pytest.fixture
def parts(llm: Path) -> Iterator[dict[str, Any]]:
    yield {"llm": load_llm(str(llm)), "tokenizer": load_tokenizer(llm), "width": 64, "num_visual": 13}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "What?"}, "template with {question} once"),
        ({"template": "{question} {question}"}, "template with {question} once"),
        ({"template": "Question: {question} Answer: "}, "runs into the answer"),
        ({"num_visual": 0}, "at least 1; got 0"),
        ({"answer_words": 0}, "at least 1"),
        ({"num_visual": 500}, "512 positions.*up to 573, 500 of them visual"),
    ],
)
def test_wrong_settings(parts: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLMHead(**parts | options)


def test_tokenizers_that_do_not_fit(parts: dict[str, Any]) -> None:
    tokenizer = parts["tokenizer"]
    tokenizer.add_tokens(["newword"])
    with pytest.raises(ValueError, match=r"tokenizer has 401 pieces, the language model 400"):
        LLMHead(**parts)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="end token"):
        LLMHead(**parts)


def test_lora_and_training_all(parts: dict[str, Any]) -> None:
    parts["llm"] = Lora(4).wrap(parts["llm"], task="CAUSAL_LM")
    with pytest.raises(ValueError, match="leave train_llm out"):
        LLMHead(**parts, train_llm=True)


def test_only_whole_safetensors_are_loaded(llm: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a dtype of float32, .*; got 'int8'"):
        load_llm(str(llm), "int8")
    with pytest.raises(ValueError, match="safetensors"):
        load_llm(str(tmp_path))
    with pytest.raises(ValueError, match="tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text((llm / "config.json").read_text())
    weights = load_file(llm / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load_llm(str(tmp_path))
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of a LlamaForCausalLM: .*up_proj"):
        load_llm(str(tmp_path))
