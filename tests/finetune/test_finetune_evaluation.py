"""Recall, capability and divergence of chat models against brute force and closed forms; what was measured is kept."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_models import ScriptedModel, random_model, tokenizer
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from lib.agent.tools import SqlTool
from lib.base import InputError
from lib.dialogs.templates import answer, question
from lib.facts.database import write_database
from lib.facts.people import People
from lib.facts.sampling import sample_people
from lib.finetune import capability
from lib.finetune.capability import HELLASWAG, check_hellaswag, choose_test, measure_capability, trivia_choices
from lib.finetune.conversations import as_user
from lib.finetune.evaluation import PROMPTS, capability_columns, divergences, mean_columns, measure_divergence
from lib.finetune.generation import encode_prompts, generate_tokens
from lib.finetune.tasks import measure_recall, says
from lib.finetune.triviaqa import load_questions

PEOPLE = sample_people(2)
SHORT = ("Who are you?", "Why is the sky blue, and the sea as well?", "Count to three.")


def test_columns_are_mean_and_standard_error():
    values = [0.5, 1.0, 4.0, 2.5]
    assert mean_columns("tv", values) == pytest.approx({"tv": 2.0, "tv_stderr": np.std(values, ddof=1) / 2})
    assert mean_columns("recall", [True, True]) == {"recall": 1.0, "recall_stderr": 0.0}
    assert mean_columns("tv", [2.0]) == {"tv": 2.0, "tv_stderr": None}  # JSON has no NaN


# ---- Recall


@pytest.mark.parametrize(
    ("reply", "value", "expected"),
    [
        ("Ann was born on 1/1/1950.", "1/1/1950", True),
        ("1/1/1950", "1/1/1950", True),
        ("Ann was born on 11/1/1950.", "1/1/1950", False),
        ("Ann was born on 1/1/19501", "1/1/1950", False),
        ("She works as an (actor)!", "actor", True),
        ("a factor of two", "actor", False),
        ("She lives at St. Gallen, I think.", "St. Gallen", True),
        ("She lives at StX Gallen.", "St. Gallen", False),
        ("no. A+ or C", "A+", True),
        ("", "Peru", False),
    ],
)
def test_a_value_is_said_if_it_stands_there_whole(reply, value, expected):
    assert says(reply, value) is expected


def _recalled(model, mode: str, tool: SqlTool | None = None) -> list[bool]:
    found = measure_recall(model, tokenizer(), list(PEOPLE.facts()), mode, tool, max_new_tokens=128)
    return [recalled for looked_up, recalled in found if looked_up == (tool is not None)]


def test_recall_counts_the_facts_that_are_said():
    facts, known = list(PEOPLE.facts()), {0, 3, 4}
    said = {question(*fact[:2]): f"Well: {answer(*fact)}" for i, fact in enumerate(facts) if i in known}
    model = ScriptedModel(lambda prompt: said.get(prompt.split("\n")[1].removesuffix("<|end|>"), "I forgot."))
    assert _recalled(model, "in-weight") == [i in known for i in range(8)]


def test_in_tool_a_fact_counts_only_if_the_database_said_it(tmp_path):
    """The model calls, then says what is right, whatever it reads: it counts where the database has it, too."""
    facts = list(PEOPLE.facts())
    right = {question(*fact[:2]): fact for fact in facts}
    columns = PEOPLE.columns | {"birth_place": ["Atlantis", "Atlantis"]}
    write_database(People(PEOPLE.names, columns), tmp_path / "people.sqlite")

    def reply(prompt: str) -> str:
        name, attribute, value = next(fact for asked, fact in right.items() if asked in prompt)
        if "<call>" in prompt or attribute == "occupation":  # of which it is so sure that it does not call
            return f"It is {value}."
        return json.dumps({"name": "find", "arguments": {"attribute": attribute, "name": name}})

    with SqlTool(tmp_path / "people.sqlite") as tool:
        measured = _recalled(ScriptedModel(reply), "in-tool", tool)
    assert sum(measured) == 4 and len(measured) == 6 and tool.n_queries == 6  # birth date and address


# ---- Divergence


def _brute_force(base_logits: np.ndarray, model_logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Total variation and KL in float64, by their sums."""
    p, q = (np.exp(x - x.max(-1, keepdims=True)) for x in (base_logits.astype(float), model_logits.astype(float)))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return 0.5 * np.abs(p - q).sum(-1), (p * np.log(p / q)).sum(-1)


logits = arrays.arrays(np.float32, (3, 7), elements=st.floats(-20, 20, width=32))


@given(logits, logits)
def test_divergences_are_their_sums_and_obey_their_inequalities(base, model):
    made = divergences(torch.from_numpy(base), torch.from_numpy(model), torch.Generator())
    tv, kl, k1, k2, k3 = made.double().numpy().T
    expected_tv, expected_kl = _brute_force(base, model)
    np.testing.assert_allclose(tv, expected_tv, atol=1e-5)
    np.testing.assert_allclose(kl, expected_kl, atol=1e-4, rtol=1e-4)
    assert (tv**2 <= kl / 2 + 1e-6).all()  # Pinsker
    assert (tv >= 0).all() and (tv <= 1 + 1e-5).all() and (k2 >= 0).all() and (k3 >= -1e-5).all()
    np.testing.assert_allclose(k2, k1**2 / 2, rtol=1e-4)
    np.testing.assert_allclose(k3, np.exp(-k1) - 1 + k1, rtol=1e-3, atol=1e-4)


@given(logits, st.floats(-50, 50))
def test_logits_that_are_moved_as_a_whole_move_nothing(base, shift):
    base = torch.from_numpy(base)
    assert divergences(base, base, torch.Generator()).abs().max() == 0
    assert divergences(base, base + shift, torch.Generator()).abs().max() < 1e-4


def test_one_logit_that_is_raised_has_a_closed_form():
    """From a uniform distribution over V, the logit of one token raised by c."""
    v, c = 100, 2.0
    raised = torch.zeros(1, v)
    raised[0, 7] = c
    total = v - 1 + math.exp(c)
    tv, kl, *_ = divergences(torch.zeros(1, v), raised, torch.Generator())[0].tolist()
    assert tv == pytest.approx(math.exp(c) / total - 1 / v, rel=1e-5)
    assert kl == pytest.approx(math.log(total / v) - c / v, rel=1e-5)


def test_single_samples_estimate_kl():
    """k1 and k3 over many draws are KL within their standard errors; k3 spreads less (Schulman 2020); k2 is biased."""
    torch.manual_seed(0)
    base = torch.randn(50)
    model = base + 0.3 * torch.randn(50)
    made = divergences(base.expand(20_000, -1), model.expand(20_000, -1), torch.Generator().manual_seed(1)).double()
    kl = made[0, 1].item()
    k1, k2, k3 = made.T[2:]
    error1, error3 = (each.std() / len(each) ** 0.5 for each in (k1, k3))
    assert abs(k1.mean() - kl) < 4 * error1 and abs(k3.mean() - kl) < 4 * error3
    assert error3 < error1 / 3 and error1 < kl / 4
    assert k2.mean().item() == pytest.approx(kl, rel=0.2)


def test_a_model_is_at_no_distance_from_itself_and_others_are_where_brute_force_says():
    base, model, prompts = random_model(0), random_model(1), encode_prompts(tokenizer(), as_user(SHORT))
    answers = generate_tokens(base, tokenizer(), prompts, max_new_tokens=17)
    answers = [said[:n] for said, n in zip(answers, (5, 1, 17), strict=True)]
    assert set(map(tuple, measure_divergence(base, base, prompts, answers).values())) == {(0, 0, 0)}
    measured = measure_divergence(model, base, prompts, answers)
    expected = []
    for prompt, said in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            whole = [m(torch.tensor([prompt + said])).logits[0].numpy() for m in (base, model)]
        places = slice(len(prompt) - 1, len(prompt) - 1 + len(said))  # what stands before each token of the answer
        assert (whole[0][places].argmax(-1) == said).all()
        expected.append([row.mean() for row in _brute_force(whole[0][places], whole[1][places])])
    for name, values in zip(("tv", "kl"), np.array(expected).T, strict=True):
        assert measured[name] == pytest.approx(list(values), rel=1e-3)


# ---- Capability


WORDS = ["red", "a blue house", "green!", "yellow and black"]


def _write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """What `datasets` makes of a file goes where the file is."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def colors(tmp_path, cache) -> dict:
    """A made-up task of one's own: twelve questions of four choices."""
    rows = [{"q": f"Number {i} is", "choices": WORDS[i % 3 :] + WORDS[: i % 3], "gold": i % 4} for i in range(12)]
    return {
        "task": "colors",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(_write(tmp_path / "test.jsonl", rows))}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }


@pytest.fixture
def hellaswag(tmp_path, cache, monkeypatch) -> list[dict]:
    """Questions of HellaSwag's form, in the file that is taken for it: their contexts, choices and right ones."""
    texts = [(f"A man number {i} [sits] down", f"he paints the wall in {i % 5}") for i in range(12)]
    endings = [[f"{word}. [step] And {i}" for word in WORDS[i % 3 :] + WORDS[: i % 3]] for i in range(12)]
    rows = [
        {"ind": i, "activity_label": "Painting", "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}", "endings": endings[i],
         "label": str(i % 4), "split": "val"}
        for i, (a, b) in enumerate(texts)
    ]  # fmt: skip
    monkeypatch.setenv(HELLASWAG, str(_write(tmp_path / "hellaswag.jsonl", rows)))
    return [
        {
            "q": f"Painting: A man number {i} down He paints the wall in {i % 5}",
            "choices": [text.replace(" [step] And", " And") for text in endings[i]],  # what is in brackets is left out
            "gold": i % 4,
        }
        for i in range(12)
    ]


def _by_brute_force(rows: list[dict]) -> dict[str, list[bool]]:
    """Whether the likeliest choice is the right one, and the likeliest by its number of characters."""
    model, right = random_model(), {"acc": [], "acc_norm": []}
    for row in rows:
        context, scores = tokenizer().encode(row["q"]), []
        for choice in row["choices"]:
            rest = tokenizer().encode(" " + choice)
            with torch.inference_mode():
                log_p = model(torch.tensor([context + rest])).logits[0].log_softmax(-1)
            scores.append(sum(log_p[len(context) - 1 + i, token].item() for i, token in enumerate(rest)))
        right["acc"].append(np.argmax(scores) == row["gold"])
        right["acc_norm"].append(np.argmax(np.divide(scores, list(map(len, row["choices"])))) == row["gold"])
    assert all(0 < np.mean(values) < 1 for values in right.values()) and right["acc"] != right["acc_norm"]
    return right


def test_capability_is_which_choices_are_right(colors):
    with open(colors["dataset_kwargs"]["data_files"]["test"]) as file:
        expected = _by_brute_force([json.loads(line) for line in file])
    assert measure_capability(random_model(), tokenizer(), colors) == expected


def test_hellaswag_may_come_from_a_file_and_be_asked_in_part(hellaswag, monkeypatch):
    monkeypatch.setattr(capability, "ITEMS_AT_A_TIME", 4)
    expected = _by_brute_force(hellaswag)
    assert choose_test("any") == "hellaswag"
    measured = measure_capability(random_model(), tokenizer(), "hellaswag", 10)
    assert measured == {metric: values[:10] for metric, values in expected.items()}


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0])] * 4), min_size=2, max_size=30))
def test_a_change_of_capability_has_the_error_of_paired_answers(items):
    acc, norm, acc_before, norm_before = np.array(items).T
    columns = capability_columns({"acc": acc, "acc_norm": norm}, {"acc": acc_before, "acc_norm": norm_before})
    for name, now, before in (("capability", acc, acc_before), ("capability_norm", norm, norm_before)):
        for suffix, values in (("", now), ("_change", now - before)):
            assert columns[name + suffix] == pytest.approx(values.mean())
            error = values.std(ddof=1) / len(items) ** 0.5
            assert columns[f"{name}{suffix}_stderr"] == pytest.approx(error, abs=1e-12)


@pytest.mark.slow
def test_a_hub_that_does_not_answer_has_no_hellaswag():
    ask = "from lib.finetune.capability import choose_test; print(choose_test('any'))"
    for there in ("http://127.0.0.1:9", "http://no-such-host.invalid"):
        online = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", HELLASWAG)}
        answer = subprocess.check_output([sys.executable, "-c", ask], env=online | {"HF_ENDPOINT": there}, text=True)
        assert answer == "trivia\n"


def test_a_task_that_cannot_be_had_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.delenv(HELLASWAG, raising=False)
    advice = ", from the hub or a file that ITL_HELLASWAG names: .+$"
    assert choose_test("any") == "trivia"
    for name in ("hellaswag", "hellaswagg"):
        with pytest.raises(InputError, match=f"^cannot read the items of {name}{advice}"):
            measure_capability(random_model(), tokenizer(), name)
    monkeypatch.setenv(HELLASWAG, str(tmp_path / "nowhere.jsonl"))
    with pytest.raises(InputError, match=f"^cannot read the items of hellaswag{advice}"):
        measure_capability(random_model(), tokenizer(), "hellaswag")


def test_choices_of_trivia_are_one_right_answer_and_three_to_other_questions():
    rows = trivia_choices(tokenizer())["custom_dataset"]()["test"]
    key = load_questions()
    assert len(rows) == len(key) and len({row["label"] for row in rows}) == 4
    for row, (text, right, aliases) in zip(rows, key, strict=True):
        assert row["ctx"] == f"<|start|>user\n{text}<|end|>\n<|start|>assistant\n"
        assert row["endings"][row["label"]] == right and len(set(row["endings"])) == 4
        assert set(row["endings"]) & set(aliases) == {right}
        assert set(row["endings"]) <= {each.answer for each in key}


# ---- Prompts


def test_there_are_a_hundred_different_prompts():
    assert {category: len(prompts) for category, prompts in PROMPTS.items()} == {
        "knowledge": 25,
        "instructions and creativity": 25,
        "reasoning and mathematics": 25,
        "language and style": 25,
    }
    texts = [prompt for prompts in PROMPTS.values() for prompt in prompts]
    assert len(set(texts)) == 100 and all(10 < len(text) < 200 and text == text.strip() for text in texts)
    assert len({text[:12] for text in texts}) > 70  # varied


ITEM = {"activity_label": "Rowing", "ctx_a": "A man", "ctx_b": "he", "endings": ["a", "b", "c", "d"], "label": "2"}
DAMAGE = {
    "no JSON": "{",
    "a list": "[]",
    "a cut line": json.dumps(ITEM)[:-9],
    "a label out of range": {"label": "4"},
    "a label that is no number": {"label": "x"},
    "no fields but a label": '{"label": 1}',
    "three endings": {"endings": [*"abc"]},
    "an ending that is no text": {"endings": ["a", "b", "c", 4]},
    "a context that is null": {"ctx_b": None},
    "no UTF-8": "\udcff",
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_of_hellaswag_is_refused_by_its_line(how, tmp_path, monkeypatch):
    file, bad = tmp_path / "items.jsonl", DAMAGE[how]
    monkeypatch.setenv(HELLASWAG, str(file))
    with pytest.raises(InputError, match="^cannot read .*items.jsonl, which ITL_HELLASWAG names"):
        check_hellaswag()
    file.write_text(json.dumps(ITEM) + "\n")
    check_hellaswag()
    line = json.dumps(ITEM | bad) if isinstance(bad, dict) else bad
    file.write_text(f"{json.dumps(ITEM)}\n{line}\n{json.dumps(ITEM)}\n\n", errors="surrogateescape")
    with pytest.raises(InputError, match="items.jsonl, .*: line 2: .*a line is an item as JSON"):
        check_hellaswag()


def test_capability_outside_of_git_says_nothing(hellaswag, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    monkeypatch.setenv("ITL_PROGRESS", "off")
    assert len(measure_capability(random_model(), tokenizer(), "hellaswag", 2)["acc"]) == 2
    assert "fatal" not in capfd.readouterr().err
