"""`scripts/dequantise.py` on a tiny GGUF file, quantised here.

Deleting this lets a checkpoint be another model than its file, such as one with its heads mixed up.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from scripts import dequantise

gguf = pytest.importorskip("gguf")

LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
TOKENS = ["<s>", "</s>", *"abcdefgh", "ab", "cd"]


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, vocab_size=len(TOKENS), max_position_embeddings=32,
        initializer_range=0.3, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.normal_(parameter, 1, 0.3)
    return model.eval()


def write_gguf(model: Any, path: Path) -> None:
    """As llama.cpp lays it out: rotated pairs of a head's query and key side by side."""
    config, state = model.config, model.state_dict()
    names = {"token_embd.weight": "model.embed_tokens.weight"}
    names["output_norm.weight"] = "model.norm.weight"
    for layer in range(config.num_hidden_layers):
        for theirs, ours in LAYER.items():
            names[f"blk.{layer}.{theirs}.weight"] = f"model.layers.{layer}.{ours}.weight"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for theirs, ours in names.items():
        values = state[ours]
        if "attn_q" in theirs:
            values = side_by_side(values, config.num_attention_heads)
        if "attn_k" in theirs:
            values = side_by_side(values, config.num_key_value_heads)
        if values.dim() == 1:
            writer.add_tensor(theirs, values.numpy())
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quantize(values.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def side_by_side(weight: Tensor, heads: int) -> Tensor:
    halves = weight.view(heads, 2, weight.shape[0] // heads // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape).contiguous()


def test_a_checkpoint_is_what_was_quantised(tmp_path: Path) -> None:
    model = llama()
    write_gguf(model, tmp_path / "tiny.gguf")
    assert dequantise.main([str(tmp_path / "tiny.gguf"), str(tmp_path / "made")]) == 0
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made").eval()
    assert type(made) is transformers.LlamaForCausalLM
    assert not hasattr(made.config, "quantization_config")
    assert made.dtype == torch.float32
    before = dict(model.named_parameters())
    assert {name for name, _ in made.named_parameters()} == before.keys()
    for name, values in made.named_parameters():
        apart = (values - before[name]).abs().max() / before[name].abs().max()
        assert apart < 0.5 / 127 + 1e-3, name  # half a step, its size in 16 bits
        assert (apart == 0) == ("norm" in name), "only matrices were quantised"
    ids = torch.arange(len(TOKENS))[None]
    with torch.no_grad():
        found, expected = made(ids).logits, model(ids).logits
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    assert tokenizer("abcde")["input_ids"][-3:] == [TOKENS.index(one) for one in ("ab", "cd", "e")]
    assert dequantise.main([str(tmp_path / "tiny.gguf"), str(tmp_path / "made")]) == 2


def test_what_is_no_gguf_file_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.gguf").write_text("something else")
    assert dequantise.main([str(tmp_path / "other.gguf"), str(tmp_path / "made")]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("dequantise: error: ")
    assert printed.count("\n") == 1
    assert dequantise.main([str(tmp_path / "none.gguf"), str(tmp_path / "made")]) == 2
    assert not (tmp_path / "made").exists()
