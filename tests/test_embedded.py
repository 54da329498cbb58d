"""The embedded base model: what its tokenizer writes and reads, how it is made once, and that it learns."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import lm_eval
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer

from lib.finetune import embedded
from lib.finetune.bases import EMBEDDED
from lib.finetune.data import IGNORED, chats, people_of, tokenize_chats
from lib.finetune.embedded import SPECIAL, embedded_model, multiple_choice_task, pretrain
from lib.finetune.skills import conversations, multiple_choice, prompts

SMOKE = EMBEDDED["embedded-smoke"]


@pytest.fixture(scope="module")
def folder():
    return embedded_model(SMOKE)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def _prompt(tokenizer, row: dict, n: int) -> str:
    """The first `n` messages, and the assistant's turn begun."""
    return tokenizer.apply_chat_template(
        row["messages"][:n], tools=row.get("tools"), tokenize=False, add_generation_prompt=True
    )


def _reply(tokenizer, row: dict, n: int) -> str:
    """Message `n`, as the assistant generates it."""
    upto = tokenizer.apply_chat_template(row["messages"][: n + 1], tools=row.get("tools"), tokenize=False)
    return upto.removeprefix(_prompt(tokenizer, row, n))


# ---- Tokens


@given(st.text(max_size=40))
def test_any_text_is_read_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_role_an_end_and_a_call_are_one_token_each(tokenizer):
    assert [tokenizer(token).input_ids for token in SPECIAL] == [[i] for i in range(len(SPECIAL))]
    assert set(SPECIAL) == set(tokenizer.all_special_tokens) and len(tokenizer) == SMOKE.vocab_size
    assert tokenizer.decode([0, 1, 7], skip_special_tokens=True) == ""


def test_a_name_has_the_same_tokens_wherever_it_stands(tokenizer):
    """In the question, between the quotes of a call, and at the start of the answer."""
    for row in chats(people_of(200), "in-tool"):
        name = row["messages"][1]["tool_calls"][0]["function"]["arguments"]["name"]
        alone = tokenizer(name).input_ids
        ids = tokenizer.apply_chat_template(row["messages"], return_dict=False)
        assert sum(ids[i : i + len(alone)] == alone for i in range(len(ids))) == 3, name


# ---- Template


def _rows() -> list[dict]:
    people = people_of(20)
    return [
        *conversations(300, 3),
        *(row for mode in ("in-weight", "in-tool", "in-tool-text") for row in chats(people, mode)),
    ]


def test_what_is_trained_is_what_the_assistant_says_and_its_end(tokenizer):
    """By the labels of fine-tuning, by the template's own marks, and by what pretraining takes."""
    rows = _rows()
    ours = embedded._collate([embedded._encode(row, tokenizer) for row in rows], tokenizer)
    for row, made, tokens, trained in zip(rows, tokenize_chats(rows, tokenizer, 999), *ours, strict=True):
        marked = tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, n = made["input_ids"], len(made["input_ids"])
        assert ids == marked["input_ids"] == tokens[:n].tolist() and (tokens[n:] == tokenizer.pad_token_id).all()
        mask = [label != IGNORED for label in made["labels"]]
        assert mask == [bool(mark) for mark in marked["assistant_masks"]] == trained[:n].tolist()
        assert not trained[n:].any()


def test_the_model_reads_which_functions_there_are(tokenizer):
    row = next(chats(people_of(4), "in-tool"))
    prompt = _prompt(tokenizer, row, 1)
    assert "find(attribute: birth_date|birth_place|current_address|occupation, name)" in prompt
    system = {"role": "system", "content": "Be kind."}
    both = tokenizer.apply_chat_template([system, *row["messages"][:1]], tools=2 * row["tools"], tokenize=False)
    assert both.startswith("<|system|>Be kind.\nfind(") and both.count("find(") == 2 and both.count("<|system|>") == 1
    assert "<|system|>" not in _prompt(tokenizer, {"messages": row["messages"]}, 1)
    with pytest.raises(Exception, match="there is no role system after the first message"):
        tokenizer.apply_chat_template([*row["messages"], system])


# ---- Calls, as servers read them

argument = st.text(st.characters(blacklist_categories=["Cs"]), max_size=12).filter(
    lambda text: not any(token in text for token in SPECIAL)
)


@given(
    st.lists(
        st.dictionaries(argument, argument | st.integers() | st.lists(argument), max_size=3), min_size=1, max_size=3
    )
)
def test_calls_are_read_as_they_are_written(tokenizer, all_arguments):
    calls = [{"type": "function", "function": {"name": "f", "arguments": arguments}} for arguments in all_arguments]
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": calls}]}
    read = tokenizer.parse_response(_reply(tokenizer, row, 1), prefix=_prompt(tokenizer, row, 1))
    assert read == {"role": "assistant", "tool_calls": calls}


def test_what_is_generated_token_by_token_is_read_alike(tokenizer):
    for row in conversations(30, 3, only="functions"):
        prompt, call = _prompt(tokenizer, row, 1), row["messages"][1]["tool_calls"][0]
        ids = tokenizer(_reply(tokenizer, row, 1)).input_ids
        parser = tokenizer.get_response_parser(prefix=prompt, tools=row["tools"])
        stream = DecodeStream(skip_special_tokens=False)  # a character may take several tokens
        for token in ids:
            parser.feed(stream.step(tokenizer.backend_tokenizer, token) or "")
        message, _ = parser.finalize()
        assert message["tool_calls"] == [{"type": "function", "function": call["function"]}]
        answer = tokenizer.parse_response(_reply(tokenizer, row, 3), prefix=_prompt(tokenizer, row, 3))
        assert answer == {"role": "assistant", "content": row["messages"][3]["content"]}


@pytest.mark.parametrize("said", ['{"x": "a', '{"x": }', "nothing"])
def test_a_call_that_is_no_json_stays_text(tokenizer, said):
    for end in ("}</tool_call><|end|>", "<|end|>", ""):
        reply = f'<tool_call>{{"name": "f", "arguments": {said}{end}'
        message = tokenizer.parse_response(reply, prefix="<|user|>?<|end|><|assistant|>")
        assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": said}}]


# ---- Made once


def test_the_folder_is_one_of_hugging_face(folder, model, tokenizer):
    kept = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert kept <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    generation = model.generation_config
    assert (generation.eos_token_id, generation.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert not generation.do_sample and tokenizer.chat_template == embedded.CHAT_TEMPLATE
    assert tokenizer.response_template == embedded.RESPONSE_TEMPLATE
    row = next(chats(people_of(4), "in-weight"))
    inputs = tokenizer.apply_chat_template(row["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] <= inputs["input_ids"].shape[1] + 3


def test_it_is_trained_once_whoever_asks(tmp_path, monkeypatch, folder):
    def never(*_):
        raise AssertionError("trained again")

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "pretrain", never)
        assert embedded_model(SMOKE) == folder
    monkeypatch.setenv("ITL_RUNS", str(tmp_path))
    times = []
    monkeypatch.setattr(embedded, "pretrain", lambda *given: times.append(given) or pretrain(SMOKE))
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(embedded_model, [SMOKE, SMOKE])
    assert first == second and len(times) == 1 and first.name == folder.name
    weights = [(made / "model.safetensors").read_bytes() for made in (first, folder)]
    assert weights[0] == weights[1]


def test_what_was_not_finished_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("ITL_RUNS", str(tmp_path))

    def fail(folder, *_):
        folder.mkdir()
        (folder / "config.json").write_text("{")
        raise OSError("the disk is full")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(embedded, "_save", fail)
        embedded_model(SMOKE)
    assert not [path for path in (tmp_path / "embedded").iterdir() if not path.name.endswith((".tmp", ".lock"))]
    assert AutoModelForCausalLM.from_pretrained(embedded_model(SMOKE)).config.vocab_size == SMOKE.vocab_size


# ---- Learning


def test_it_learns(tokenizer):
    """A smallest model, after some seconds: answers to held-out questions are likelier than by chance."""
    rows = [
        {"messages": [_says("user", row["ctx"]), _says("assistant", row["endings"][row["label"]])]}
        for row in multiple_choice(66, 0)
    ]
    tokens, trained = embedded._collate([embedded._encode(row, tokenizer) for row in rows], tokenizer)
    model, _ = pretrain(SMOKE.model_copy(update={"copying_steps": 10, "steps": 50, "batch_size": 16}))
    logits = model(tokens[:, :-1])[trained[:, 1:]]
    loss = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][trained[:, 1:]])
    assert loss < 0.7 * math.log(SMOKE.vocab_size)


def _says(role: str, content: str) -> dict:
    return {"role": role, "content": content}


# ---- Multiple choice


def test_the_harness_chooses_what_the_model_finds_likeliest(model, tokenizer):
    n = 44
    run = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", batch_size=32),
        tasks=[multiple_choice_task(tokenizer, n)],
        task_manager=TaskManager(include_defaults=False),
    )
    scores = run["results"]["skills"]
    right, right_norm = [], []
    for row in multiple_choice(n, 0):
        prompt = tokenizer.apply_chat_template([_says("user", row["ctx"])], add_generation_prompt=True)["input_ids"]
        sums = []
        for ending in row["endings"]:
            ids = tokenizer(ending).input_ids
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
            sums.append(logits.log_softmax(-1)[torch.arange(len(ids)), ids].sum().item())
        per_byte = [total / len(ending) for total, ending in zip(sums, row["endings"], strict=True)]
        right.append(max(range(4), key=sums.__getitem__) == row["label"])
        right_norm.append(max(range(4), key=per_byte.__getitem__) == row["label"])
    assert scores["acc,none"] == pytest.approx(sum(right) / n)
    assert scores["acc_norm,none"] == pytest.approx(sum(right_norm) / n)


def test_prompts_can_be_asked(model, tokenizer):
    for _, row in prompts(12, 0):
        inputs = tokenizer.apply_chat_template(
            row["messages"], tools=row.get("tools"), add_generation_prompt=True, return_tensors="pt"
        )
        assert model(**inputs).logits.isfinite().all()
