"""Chat lines become messages, tokens with a mask of the answers, and packed samples; bad lines are listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lrpath.cli import main as lrpath
from megatron_lrpath.data.preprocess.worker import Rejected
from megatron_lrpath.data.record import control_tokens
from megatron_lrpath.errors import PlanError, UserError
from megatron_lrpath.plan import load_plan
from megatron_lrpath.plan.sft import PREPARED
from megatron_lrpath.sealed import write_sealed
from megatron_lrpath.sft.encode import ChatEncoder, build_encoder
from megatron_lrpath.sft.prepare import prepare
from megatron_lrpath.sft.prepared import TRAIN, held_out, open_prepared, pack
from megatron_lrpath.sft.template import ChatTemplate, messages_of
from tests.support.plan_text import plan_with
from tests.support.sft_fixtures import GOLDEN, TOKENIZER, conversations, sft_plan, write_lines

USER = {"role": "user", "content": "2 and 3?"}
ANSWER = {"role": "assistant", "content": "It is 5."}
PLAIN = "User:\n2 and 3?\n\nAssistant:\n"
CHATML = "<|im_start|>user\n2 and 3?<|im_end|>\n<|im_start|>assistant\n"
OWN = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
OWN += "{% if add_generation_prompt %}[assistant]{% endif %}"


def encoder(folder: Path, **sft: Any) -> ChatEncoder:
    """Return the encoder of a plan whose `sft` has these keys."""
    section = {"data": "chat.jsonl", "epochs": 1, "max_lr": 1e-3} | sft
    return build_encoder(plan_with(folder, tokenizer=TOKENIZER, sft=section))


def learned(encoder: ChatEncoder, messages: list[dict[str, str]]) -> list[str]:
    """Return the parts of a conversation that are learned, as text."""
    example = encoder.encode(messages)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], example.answers, [0]])))
    stretches = [example.tokens[start:end].tolist() for start, end in edges.reshape(-1, 2)]
    return [encoder.tokenizer.decode(ids, skip_special_tokens=False) for ids in stretches]


@pytest.mark.parametrize(
    ("line", "messages"),
    [
        ({"messages": [USER, ANSWER], "id": 7}, [USER, ANSWER]),
        ({"prompt": "2 and 3?", "completion": "It is 5."}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        ({"instruction": "2 and 3?", "output": "It is 5.", "input": ""}, [USER, ANSWER]),
        (
            {"instruction": "Add.", "input": "2 3", "output": "5"},
            [{"role": "user", "content": "Add.\n\n2 3"}, {"role": "assistant", "content": "5"}],
        ),
    ],
)
def test_three_forms_are_read(line: dict[str, Any], messages: list[dict[str, str]]) -> None:
    assert messages_of(json.dumps(line).encode()) == messages


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON"),
        (b'"text"', "not a JSON object"),
        (b"\xff", "not"),
        (b'{"text": "x"}', "none of the forms"),
        (b'{"messages": []}', "not the assistant's"),
        (json.dumps({"messages": [USER]}).encode(), "not the assistant's"),
        (json.dumps({"messages": [{"role": "robot", "content": "x"}]}).encode(), "role 'robot'"),
        (json.dumps({"messages": [USER, {"role": "assistant"}]}).encode(), "no text"),
        (json.dumps({"prompt": "x", "completion": " "}).encode(), "is empty"),
        (b'{"prompt": "x", "completion": "\\ud800"}', "surrogate"),
    ],
)
def test_unusable_conversations_are_rejected_with_a_reason(line: bytes, reason: str) -> None:
    with pytest.raises(Rejected, match=reason):
        messages_of(line)


@pytest.mark.parametrize(
    ("sft", "prompt", "end"),
    [
        ({}, PLAIN, "</s>"),
        ({"chat_template": "chatml", "special_tokens": ["<|im_start|>", "<|im_end|>"]}, CHATML, "<|im_end|>"),
    ],
    ids=["plain", "chatml"],
)
def test_answers_alone_are_learned_each_with_its_end(
    tmp_path: Path, sft: dict[str, Any], prompt: str, end: str
) -> None:
    chat = encoder(tmp_path, **sft)
    text, _ = chat.template.render([USER, ANSWER])
    assert text.startswith(prompt)
    second = [{"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "\U0001f600 yes"}]
    assert learned(chat, [USER, ANSWER, *second]) == [f"It is 5.{end}", f"\U0001f600 yes{end}"]
    assert chat.tokenizer.id_to_token(chat.stop_token()) == end


def test_a_template_without_marks_is_compared_with_its_generation_prompt(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text(OWN)
    chat = encoder(tmp_path, chat_template=str(tmp_path / "own.jinja"))
    assert learned(chat, [USER, ANSWER, USER, ANSWER]) == ["It is 5.", "It is 5."]
    assert chat.stop_token() is None


def test_a_hugging_face_tokenizers_control_tokens_end_an_answer(tmp_path: Path) -> None:
    tokenizer = {"type": "HuggingFaceTokenizer", "model": str(GOLDEN / "hf")}
    section = {"data": "chat.jsonl", "epochs": 1, "max_lr": 1e-3}
    chat = build_encoder(plan_with(tmp_path, tokenizer=tokenizer, sft=section))
    # this tokenizer has no capitals
    answer = {"role": "assistant", "content": "it is 5."}
    assert learned(chat, [USER, answer]) == ["it is 5.<|endoftext|>"]


def test_no_token_reaches_across_the_border_of_an_answer(tmp_path: Path) -> None:
    """`er` is one token of this tokenizer; a prompt that ends in e is followed by an answer that begins with r."""
    (tmp_path / "own.jinja").write_text(OWN.replace("[assistant]", "e").replace("[{{ m['role'] }}]", "e"))
    chat = encoder(tmp_path, chat_template=str(tmp_path / "own.jinja"))
    assert len(chat.tokenizer.encode("er", add_special_tokens=False).ids) < 3
    messages = [USER, {"role": "assistant", "content": "rat"}]
    example = chat.encode(messages)
    text, [(start, _)] = chat.template.render(messages)
    prompt = chat.tokenizer.encode(text[:start], add_special_tokens=False).ids
    assert example.tokens[: len(prompt)].tolist() == prompt
    assert example.answers.tolist() == [0] * len(prompt) + [1] * (len(example.tokens) - len(prompt))


def test_a_message_that_spells_out_a_control_token_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(Rejected, match="message 1 spells out the control token </s>"):
        encoder(tmp_path).encode([{"role": "user", "content": "a </s> b"}, ANSWER])


@pytest.mark.parametrize(
    ("sft", "said"),
    [
        ({"chat_template": "chatml"}, "are plain text for the tokenizer; add special_tokens"),
        ({"chat_template": "tokenizer"}, "has no chat template"),
        ({"chat_template": "missing.jinja"}, "cannot be read as a file"),
        ({"special_tokens": [f"<|{number}|>" for number in range(41)]}, "have 40 rows beyond"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(tmp_path: Path, sft: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        encoder(tmp_path, **sft)


def test_a_template_that_fails_rejects_the_line() -> None:
    template = ChatTemplate("{{ raise_exception('no systems here') }}")
    with pytest.raises(Rejected, match="no systems here"):
        template.render([USER, ANSWER])


def test_packing_wastes_little_and_loses_nothing() -> None:
    generator = np.random.default_rng(4)
    lengths = generator.integers(1, 100, size=2000)
    bins = pack(lengths, 128)
    assert sorted(item for one in bins for item in one) == list(range(2000))
    assert max(int(lengths[one].sum()) for one in bins) <= 128
    assert lengths.sum() / (len(bins) * 128) > 0.98
    for _ in range(3):  # the number of samples is the same in every order
        assert len(pack(lengths[generator.permutation(2000)], 128)) == len(bins)


def test_held_out_examples_are_a_part_by_the_seed() -> None:
    train, valid = held_out(50, 0.1, 7)
    assert sorted([*train, *valid]) == list(range(50))
    assert len(valid) == 5
    assert held_out(50, 0.1, 7)[1].tolist() == valid.tolist() != held_out(50, 0.1, 8)[1].tolist()
    assert [len(part) for part in held_out(2, 0.01, 7)] == [1, 1]


def test_bad_lines_are_listed_and_too_many_are_an_error(tmp_path: Path) -> None:
    long = {"prompt": "x", "completion": "many words " * 60}
    rows = [*conversations(4), "{broken", long, "", {"prompt": "</s>", "completion": "x"}]
    plan = load_plan(sft_plan(tmp_path))
    write_lines(tmp_path / "chat.jsonl", rows)
    with pytest.raises(UserError, match=r"3 of 7 documents were rejected, sft.max_rejects allows 0"):
        prepare(plan)
    assert plan.prepared_record() is None
    listed = (plan.sft_folder / "train.rejects").read_text().splitlines()
    assert [line.partition("chat.jsonl:")[2].split(":")[0] for line in listed] == ["5", "6", "8"]
    plan = load_plan(sft_plan(tmp_path, max_rejects=2, too_long="cut"))
    write_lines(tmp_path / "chat.jsonl", rows)
    record = prepare(plan)
    assert (record["train"]["examples"], record["train"]["rejected"]) == (5, 2)


def test_data_are_prepared_once_and_again_where_they_changed(tmp_path: Path) -> None:
    plan = load_plan(sft_plan(tmp_path))
    first = prepare(plan)
    assert prepare(plan) == first
    assert plan.run("ours", "sft-v1").last_step == -(-2 * first["train"]["samples"] // 4)
    write_lines(tmp_path / "chat.jsonl", conversations(50))
    assert prepare(plan)["train"]["examples"] == 50
    begun = tmp_path / "runs/ours/sft-v1"
    begun.mkdir(parents=True)
    (begun / "lineage.json").write_text("{}")
    write_lines(tmp_path / "chat.jsonl", conversations(30))
    with pytest.raises(UserError, match="the content of the data files changed since"):
        prepare(plan)
    (tmp_path / "chat.jsonl").unlink()  # prepared data do not need their sources
    assert prepare(plan)["train"]["examples"] == 50


def test_the_old_data_are_kept_until_the_new_data_are_complete(tmp_path: Path) -> None:
    plan = load_plan(sft_plan(tmp_path))
    first = prepare(plan)
    (plan.sft_folder / "notes.txt").write_text("the user's")
    before = {path.name: path.read_bytes() for path in plan.sft_folder.glob("data-1/train_*")}
    assert before
    write_lines(tmp_path / "chat.jsonl", [*conversations(50), "{broken"])
    with pytest.raises(UserError, match="1 of 51 documents were rejected"):
        prepare(plan)
    assert plan.prepared_record() == first
    assert {path.name: path.read_bytes() for path in plan.sft_folder.glob("data-*/train_*")} == before
    write_lines(tmp_path / "chat.jsonl", conversations(50))
    assert prepare(plan) == plan.prepared_record() != first
    names = {path.name for path in plan.sft_folder.iterdir()}
    assert names == {"data-2", "prepared.json", "notes.txt", ".lock"}
    assert {path.name for path in (plan.sft_folder / "data-2").iterdir()} == set(before)


def test_data_of_earlier_versions_count_until_they_are_prepared_again(tmp_path: Path) -> None:
    """The data are next to their record, which names no folder."""
    plan = load_plan(sft_plan(tmp_path))
    record = prepare(plan)
    assert record.pop("folder") == "data-1"
    for path in (plan.sft_folder / "data-1").iterdir():
        path.rename(plan.sft_folder / path.name)
    (plan.sft_folder / "data-1").rmdir()
    write_sealed(plan.sft_folder / PREPARED, record)
    assert prepare(plan) == record
    prepared = open_prepared(plan, verify=True)
    assert prepared.examples(TRAIN)[0] == plan.sft_folder / TRAIN
    assert control_tokens(plan.sft_folder / "train_tokens") == len(record["control_tokens"]) > 0
    write_lines(tmp_path / "chat.jsonl", conversations(50))
    record = prepare(plan)
    assert {path.name for path in plan.sft_folder.iterdir()} == {"data-1", "prepared.json", ".lock"}
    assert control_tokens(plan.sft_folder / "data-1/train_tokens") == len(record["control_tokens"])
    assert open_prepared(plan, verify=True).record == record


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp", "", 3, "data-0"])
def test_a_record_that_names_another_folder_is_refused(tmp_path: Path, name: object) -> None:
    plan = load_plan(sft_plan(tmp_path))
    write_sealed(plan.sft_folder / PREPARED, prepare(plan) | {"folder": name})
    with pytest.raises(UserError, match="is damaged"):
        open_prepared(plan, verify=True)


def test_a_validation_file_is_prepared_as_well(tmp_path: Path) -> None:
    held = write_lines(tmp_path / "held.jsonl", conversations(6))
    record = prepare(load_plan(sft_plan(tmp_path, valid=str(held))))
    assert (record["train"]["examples"], record["valid"]["examples"]) == (40, 6)


def test_examples_that_are_learned_are_not_held_out(tmp_path: Path) -> None:
    plan = load_plan(sft_plan(tmp_path, valid=str(tmp_path / "ch*.jsonl")))
    with pytest.raises(UserError, match=r"sft\.valid: .*chat\.jsonl is in `data` as well"):
        prepare(plan)
    chats = str(tmp_path / "chat.jsonl")
    with pytest.raises(UserError, match=r"sft\.data: .*chat\.jsonl is named twice"):
        prepare(load_plan(sft_plan(tmp_path, data=[chats, chats])))
    with pytest.raises(UserError, match=r"sft\.data none\.jsonl: no such file"):
        prepare(load_plan(sft_plan(tmp_path, data="none.jsonl")))


def test_lines_without_a_conversation_are_refused_with_the_forms(tmp_path: Path) -> None:
    plan = load_plan(sft_plan(tmp_path))
    write_lines(tmp_path / "chat.jsonl", [{"text": "a"}] * 4)
    with pytest.raises(UserError, match="A line must be a JSON object with `messages`") as raised:
        prepare(plan)
    assert "--json-keys" not in str(raised.value)


def test_steps_follow_from_the_data_where_epochs_are_given(tmp_path: Path) -> None:
    plan = load_plan(sft_plan(tmp_path))
    assert plan.sft_runs("ours") == []
    with pytest.raises(UserError, match=r"lrpath sft .* --prepare"):
        plan.run("ours", "sft-v1")
    run = load_plan(sft_plan(tmp_path, epochs=None, steps=7)).run("ours", "sft-v1")
    assert (run.kind, run.first_step, run.last_step) == ("sft", 0, 7)
    assert run.parent is not None
    assert (run.parent.run, run.parent.step) == ("branch-v1", 4)


@pytest.mark.parametrize(
    ("sft", "said"),
    [
        ({"steps": 4}, "sft.steps: give either `epochs` or `steps`, not both"),
        ({"epochs": None}, "sft: give either `epochs` or `steps`"),
        ({"max_lr": None}, "the key 'max_lr' is missing"),
        ({"min_lr": 1.0}, "sft.min_lr: 1.0 is above max_lr"),
        ({"valid": 1.5}, "sft.valid: must be above 0 and below 1"),
        ({"versions": ["v9"]}, "sft.versions[0]: 'v9' is none of v1, v2"),
        ({"paradigms": []}, "sft.paradigms: names none"),
        ({"global_batch_size": 5, "micro_batch_size": 2}, "sft.global_batch_size: "),
        ({"megatron": {"lr": 1.0}}, "sft.megatron.lr: cannot be set here"),
        ({"megatron": {"num-layers": 3}}, "sft.megatron.num-layers: cannot be set here"),
        ({"megatron": {"context_parallel_size": 2}}, "sft.megatron.context_parallel_size: cannot be set"),
        ({"rate": 1}, "sft.rate: unknown key"),
        ({"epochs": None, "steps": 3, "warmup_steps": 3}, "sft.warmup_steps: a warm-up of 3 steps fills"),
    ],
)
def test_a_section_that_cannot_be_is_refused_with_key_and_line(
    tmp_path: Path, sft: dict[str, Any], said: str
) -> None:
    section = {"data": "chat.jsonl", "epochs": 1, "max_lr": 1e-3} | sft
    with pytest.raises(PlanError) as caught:
        plan_with(tmp_path, sft={key: value for key, value in section.items() if value is not None})
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path}/plan.yaml:")


def test_the_section_is_shown_with_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sft_plan(tmp_path)
    assert lrpath(["plan", str(path), "--no-curves"]) == 0
    assert "data not prepared yet" in " ".join(capsys.readouterr().out.split())
    assert lrpath(["sft", str(path), "--prepare", "--workers", "1"]) == 0
    assert f"next: lrpath sft {path}" in capsys.readouterr().out
    assert lrpath(["plan", str(path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["sft"]
    assert {(run["paradigm"], run["name"]) for run in told["runs"]} == {
        (name, "sft-v1") for name in ("ours", "ptfs", "cpt")
    }
    assert lrpath(["status", str(path)]) == 0
    assert "waiting for ours/branch-v1 at step 4" in capsys.readouterr().out
