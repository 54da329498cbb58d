"""Loading chat models and tokenizers: from folders, adapters onto their base, and what goes wrong in one sentence."""

import json
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path

import peft
import pytest
import torch
from chat_models import random_model, tokenizer
from transformers import AddedToken, PreTrainedTokenizerFast
from vocabularies import train_bpe

from lib.base import InputError
from lib.facts.sampling import sample_people
from lib.finetune.bases import fingerprint
from lib.finetune.conversations import chats
from lib.finetune.models import load_model, load_tokenizer
from lib.finetune.tokens import trained_parts

TOKENS = torch.arange(20)[None]


@pytest.fixture
def folder(tmp_path):
    random_model().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_gives_back_model_and_tokenizer(folder):
    model = load_model(folder, "cpu")
    torch.testing.assert_close(model(TOKENS).logits, random_model()(TOKENS).logits)
    assert model.config._attn_implementation == "eager" and not model.training
    assert load_model(str(folder), "cpu", "bfloat16").dtype == torch.bfloat16
    text = [{"role": "user", "content": "Who, Ann?"}]
    assert load_tokenizer(folder).apply_chat_template(text) == tokenizer().apply_chat_template(text)


#: Of templates that come with trl: the model, and the tokens that mark its turns.
MARKS = {
    "qwen3": ["<|im_start|>", "<|im_end|>"],
    "gemma3": ["<start_of_turn>", "<end_of_turn>"],
    "llama3_2": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}


def _with_template(folder: Path, template: str, marks: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=train_bpe(), eos_token="<|end|>", chat_template=template)
    made.add_tokens([AddedToken(mark, special=True) for mark in marks])  # not among `all_special_tokens`
    made.save_pretrained(folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("mode", ["in-weight", "in-tool", "in-tool-text"])
@pytest.mark.parametrize("name", MARKS)
def test_templates_of_the_bases_train_what_is_said_and_nothing_else(name, mode, tmp_path):
    made = _with_template(tmp_path, (files("trl") / "chat_templates" / f"{name}.jinja").read_text(), MARKS[name])
    chat = next(chats(sample_people(1), mode))
    if (name, mode) == ("gemma3", "in-tool"):  # it knows no calls
        with pytest.raises(InputError, match="conversation 1 in the tokenizer's chat template"):
            trained_parts(chat, made)
        return
    said = [text for text, trained in trained_parts(chat, made) if trained]
    turns = [message for message in chat["messages"] if message["role"] == "assistant"]
    assert len(said) == len(turns) and all(text.endswith(MARKS[name][-1]) for text in said)
    assert not any("think" in text for text in said)


def test_the_date_in_a_template_is_always_the_same(tmp_path):
    for written in ("{{ strftime_now('%d %B %Y') }}", '{% set today = strftime_now("%d %b %Y") %}{{ today }}'):
        assert _with_template(tmp_path, written).apply_chat_template([{}], tokenize=False) == "26 Jul 2024"


def test_an_adapter_is_loaded_onto_its_base(folder, tmp_path):
    config = peft.LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(load_model(folder, "cpu"), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    expected = adapted(TOKENS).logits
    assert not torch.allclose(expected, random_model()(TOKENS).logits)
    torch.testing.assert_close(load_model(tmp_path / "adapter", "cpu")(TOKENS).logits, expected)


def test_adapters_whose_base_is_gone_name_the_base(folder, tmp_path):
    adapter, moved = tmp_path / "run" / "model", tmp_path / "moved"
    peft.get_peft_model(load_model(folder, "cpu"), peft.LoraConfig(target_modules=["q_proj"])).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(moved)}))
    with pytest.raises(InputError, match=rf"^cannot read a model from {adapter}: give a folder .*: .*{moved}"):
        load_model(adapter, "cpu")
    (adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=rf"^cannot read a model from {adapter}: give a folder .+: "):
        load_model(adapter, "cpu")


@pytest.mark.parametrize("name", ["m" * 300, "m/" * 5_000, "m\0", "\udcff"], ids=ascii)
def test_a_name_that_no_folder_can_have_is_a_models_own_digest_and_nothing_that_loads(name):
    assert fingerprint(name) == name
    with pytest.raises(InputError, match="cannot read a tokenizer from"):
        load_tokenizer(name)


def test_a_hidden_file_beside_the_weights_makes_no_other_model(folder):
    before = fingerprint(folder)
    (folder / "._model.safetensors").write_bytes(b"\0\5\x16\7")
    assert fingerprint(folder) == before
    (folder / "generation_config.json").write_text("{}")
    assert fingerprint(folder) != before


#: Code of a folder's own, which says that it ran.
_OWN_CODE = """\
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path(r"{mark}").touch()
class OwnConfig(LlamaConfig): model_type = "own"
class OwnModel(LlamaForCausalLM): config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast): pass
"""


@pytest.mark.parametrize("of_adapter", [False, True])
def test_code_that_a_folder_brings_never_runs_whatever_is_answered(folder, tmp_path, monkeypatch, of_adapter):
    (folder / "own.py").write_text(_OWN_CODE.format(mark=tmp_path / "it ran"))
    maps = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": maps}))
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | own))
    source = folder
    if of_adapter:
        source = tmp_path / "adapter"
        peft.LoraConfig(base_model_name_or_path=str(folder), task_type="CAUSAL_LM").save_pretrained(source)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(InputError, match="code that comes with a model is never run.*contains custom code") as caught:
        load_model(source, "cpu")
    assert "\n" not in str(caught.value)
    if not of_adapter:
        with pytest.raises(InputError, match="code that comes with a model is never run.*contains custom code"):
            load_tokenizer(source)
    assert not (tmp_path / "it ran").exists()


def test_what_is_no_model_is_one_sentence(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    for source in (tmp_path / "nowhere", "no such name", "nobody/nothing", tmp_path / "empty"):
        for what, load in {"model": load_model, "tokenizer": load_tokenizer}.items():
            sentence = rf"^cannot read a {what} from {source}: give a folder .* \(itl fetch; .*: "
            with pytest.raises(InputError, match=sentence):
                load(source)
    with pytest.raises(InputError, match="no device 'cuda:99'"):
        load_model(folder, "cuda:99")


def test_a_model_of_recurrent_layers_is_refused(tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="it has recurrent layers"):
        load_model(tmp_path, "cpu")


def test_a_damaged_folder_is_one_sentence_and_no_random_weights(folder, tmp_path):
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:1000])
    with pytest.raises(InputError, match=r"^cannot read a model from .+: give a folder .+: "):
        load_model(folder, "cpu")
    (folder / "model.safetensors").write_bytes(weights)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(InputError, match=r"it lacks the weights model\.layers\.2\..* and 8 more"):
        load_model(folder, "cpu")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"model_type": ["llama"]}),
        ("config.json", {"id2label": []}),
        ("tokenizer_config.json", {"eos_token": 5}),
        ("tokenizer_config.json", None),
        ("tokenizer.json", {"model": {}}),
        ("tokenizer.json", 1),
    ],
)
def test_files_of_another_form_are_one_sentence(folder, name, change):
    """transformers raises errors of a dozen types, plain `Exception` among them."""
    content = json.loads((folder / name).read_text()) | change if isinstance(change, dict) else change
    (folder / name).write_text(json.dumps(content))
    load = load_model if name == "config.json" else load_tokenizer
    with pytest.raises(InputError, match=r"^cannot read a .+ from .+: give a folder .+: "):
        load(folder)


@pytest.mark.parametrize("source", ["owner/name", "."])
def test_a_package_that_a_model_needs_is_named(source, monkeypatch):
    def load(*_, **__):
        raise ImportError("\nThe model needs bitsandbytes.\nRun pip install")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", load)
    with pytest.raises(InputError, match=r": The model needs bitsandbytes. Run pip install$"):
        load_tokenizer(source)


class _Gated(BaseHTTPRequestHandler):
    """A hub on which every model is gated."""

    def do_HEAD(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_): ...


def test_a_gated_model_is_one_sentence(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        address = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", address)
        with pytest.raises(InputError, match=r"from owner/model: .*gated: hf auth login\).*: .*gated"):
            load_model("owner/model", "cpu")
    finally:
        server.shutdown()
        server.server_close()
