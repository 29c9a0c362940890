"""A GGUF file holds the pruned model as llama.cpp understands it.

Without these tests a file could load and compute something else: heads with their features in
another order, a layer that llama.cpp skips, or a text that is cut in other places. The tests
compute from the file what llama.cpp computes (`tests.export.llama_cpp_graph`); the last ones run
llama.cpp itself, if llama-cpp-python is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, normalizers, pre_tokenizers
from torch import Tensor

from rfprune.errors import UserError
from rfprune.export.gguf import QUANTIZED_BLOCK, check_gguf, export_gguf
from rfprune.export.gguf_vocabulary import PRE_TOKENIZERS, read_vocabulary
from rfprune.main import main
from rfprune.model.checkpoint import load_pruned
from rfprune.model.compact import compact
from rfprune.model.depth import remove_layers
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks
from rfprune.model.plain import to_plain
from rfprune.report.report_json import read_report
from rfprune.settings import Settings
from tests.export.byte_level import TEMPLATE, byte_level_tokenizer, sentencepiece_tokenizer
from tests.export.llama_cpp_graph import GgufFile, logits

pytest.importorskip("gguf")

Tiny = Callable[..., Any]

TEXT = "the cat sat on that hat 2024, isn't it?  \u00e9\u4e16 <tool> end\n\n"
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GEMMA3: dict[str, Any] = {
    "num_hidden_layers": 7,
    "query_pre_attn_scalar": 8,
    "sliding_window": 8,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 3000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
GEMMA3_LONG = {
    "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
"""Rotary positions as in the larger Gemma 3 models."""


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_tokenizer()


@pytest.fixture
def decoder(tiny_model: Tiny) -> Callable[..., Any]:
    """`decoder("llama", **config)`: three layers, with weights that float16 holds exactly."""

    def make(model_type: str = "llama", **config: Any) -> Any:
        settings = {"num_hidden_layers": 3, "hidden_size": 32, "vocab_size": 320} | config
        if "num_attention_heads" in config or model_type == "mistral":
            settings["num_key_value_heads"] = settings.get("num_attention_heads", 4)
        model = tiny_model(model_type, "causal-lm", **settings)
        for name, parameter in model.named_parameters():
            if model_type == "gemma3_text" and "norm" in name:
                parameter.data -= 1  # its norms multiply by 1 + weight
            parameter.data = parameter.data.half().float()
        return model

    return make


def pruned(model: Any, *empty: str, heads: int = 1, neurons: int = 5) -> Any:
    """Without some units of every block, more of them in later layers, and without whole blocks."""
    layout = layout_of(model)
    masks = full_masks(layout)
    for block, mask in zip(layout.blocks, masks, strict=True):
        removed = (heads if block.kind == "head" else neurons) + block.layer // 2
        mask[: block.num_units if block.name in empty else removed] = 0
    return compact(model, layout, masks)


def assert_file_computes(path: Path, model: Any, architecture: str) -> GgufFile:
    """What llama.cpp computes from the file is what the model computes."""
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    found = logits(path, ids)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert expected.std() > 0.1, "and that is not nothing"
    file = GgufFile(path)
    assert file.architecture == architecture
    return file


@pytest.mark.parametrize(
    ("model_type", "config"),
    [
        ("llama", {}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 4.0}}),
        ("mistral", {"sliding_window": 64}),
        ("qwen2", {}),
    ],
)
@pytest.mark.parametrize(
    "empty",
    [
        (),
        ("layer.1.heads", "layer.2.heads"),
        ("layer.0.heads",),
        ("layer.0.neurons", "layer.2.neurons"),
        ("layer.1.heads", "layer.1.neurons"),
    ],
)
def test_unequal_layers_are_the_pruned_model(
    model_type: str,
    config: dict[str, Any],
    empty: tuple[str, ...],
    decoder: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = pruned(decoder(model_type, **config), *empty)
    path = tmp_path / "model.gguf"
    export_gguf(model, tokenizer, path)
    file = assert_file_computes(path, model, "deci")
    tied = bool(config.get("tie_word_embeddings"))
    assert ("output.weight" in file.tensors) != tied
    assert len(set(file.entry("feed_forward_length"))) > 1
    for name, kind in file.types.items():
        assert kind == ("F32" if file.tensors[name].dim() == 1 else "F16"), name


PLAIN: list[tuple[str, dict[str, Any], int, str]] = [
    ("llama", {}, 2, "llama"),
    ("mistral", {"sliding_window": 64}, 2, "llama"),
    ("qwen2", {"head_dim": 4}, 4, "qwen2"),
    ("qwen2", {"head_dim": 4}, 2, "deci"),
    ("qwen3", {}, 2, "qwen3"),
    ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}, 2, "smollm3"),
    ("gemma3_text", GEMMA3, 2, "gemma3"),
]
"""Model type, configuration, heads that are kept, and the architecture in the file."""


def plain_model(model: Any, heads: int) -> Any:
    """With the same number of heads and five neurons in every layer."""
    layout = layout_of(model)
    masks = full_masks(layout)
    for block, mask in zip(layout.blocks, masks, strict=True):
        mask[heads if block.kind == "head" else 5 :] = 0
    return to_plain(compact(model, layout, masks))


@pytest.mark.parametrize(("model_type", "config", "heads", "architecture"), PLAIN)
def test_equal_layers_are_the_familys_own_architecture(
    model_type: str,
    config: dict[str, Any],
    heads: int,
    architecture: str,
    decoder: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    plain = plain_model(decoder(model_type, **config), heads)
    path = tmp_path / "model.gguf"
    export_gguf(plain, tokenizer, path)
    file = assert_file_computes(path, plain, architecture)
    assert file.entry("feed_forward_length") == 5
    assert file.entry("attention.head_count_kv") == heads
    window = 514 if architecture == "gemma3" else config.get("sliding_window", 514)
    assert file.entry("context_length") == window


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_quantised_weights_are_near_and_rows_are_filled_up(
    kind: str, decoder: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = pruned(decoder(num_attention_heads=4, head_dim=32, intermediate_size=70))
    for name in ("exact", "small"):
        export_gguf(model, tokenizer, tmp_path / name, "f16" if name == "exact" else kind)
    exact, small = GgufFile(tmp_path / "exact"), GgufFile(tmp_path / "small")
    assert small.entry("feed_forward_length") == [96, 96, 64]
    assert small.tensors.keys() == exact.tensors.keys()
    for name, values in small.tensors.items():
        whole = exact.tensors[name]
        difference = values[tuple(slice(size) for size in whole.shape)] - whole
        other = values.clone()
        other[tuple(slice(size) for size in whole.shape)] = 0
        assert not other.any(), "what is added is zeros"
        is_embedding = name in ("token_embd.weight", "output.weight")
        expected = "F32" if values.dim() == 1 else "Q8_0" if is_embedding else kind.upper()
        assert small.types[name] == expected
        steps = {"F32": torch.inf, "Q8_0": 127, "Q4_0": 8}[expected]
        assert difference.abs().max() <= 1.1 * whole.abs().max() / steps + 1e-6
    assert (tmp_path / "small").stat().st_size < (tmp_path / "exact").stat().st_size


def test_heads_that_do_not_fill_a_block_stay_in_float16(
    decoder: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = pruned(decoder())
    export_gguf(model, tokenizer, tmp_path / "small", "q8_0")
    types = GgufFile(tmp_path / "small").types
    assert model.model.layers[0].self_attn.o_proj.weight.shape[1] % QUANTIZED_BLOCK
    assert types["blk.0.attn_output.weight"] == "F16"
    assert types["blk.0.attn_q.weight"] == "Q8_0"


def test_the_model_that_is_exported_stays_as_it_is(
    decoder: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = pruned(decoder(), "layer.1.neurons").to(torch.bfloat16).train()
    before = {name: values.clone() for name, values in model.state_dict().items()}
    for name in ("one", "two"):
        export_gguf(model, tokenizer, tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert model.training and model.dtype == torch.bfloat16
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())


def test_the_tokenizer_is_in_the_file(
    decoder: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    export_gguf(decoder(), tokenizer, tmp_path / "model.gguf")
    fields = GgufFile(tmp_path / "model.gguf").fields
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert tokens[: len(tokenizer)] == tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert tokens[-1] == "[PAD319]"
    assert len(tokens) == len(types) == 320
    assert [types[0], types[1], types[20], types[len(tokenizer) - 1], types[-1]] == [3, 3, 1, 4, 5]
    assert "t h" in fields["tokenizer.ggml.merges"]
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.bos_token_id"] == 1
    assert fields["tokenizer.ggml.eos_token_id"] == 2
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.chat_template"] == TEMPLATE


def split(pattern: str) -> list[Any]:
    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


STEPS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ],
    **{
        name: split(rules[0][1])
        for name, (rules, _) in PRE_TOKENIZERS.items()
        if rules[0][0] == "Split"
    },
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_pre_tokenizers_are_known_by_their_rules(name: str) -> None:
    tokenizer = byte_level_tokenizer(*STEPS[name], whole_words=PRE_TOKENIZERS[name][1])
    assert read_vocabulary(tokenizer, 320).pre == name
    other = byte_level_tokenizer(*STEPS[name], whole_words=not PRE_TOKENIZERS[name][1])
    with pytest.raises(UserError, match="pre-tokenizer is none of gpt-2, smollm"):
        read_vocabulary(other, 320)


@pytest.mark.parametrize(("prefix", "splits"), [(True, False), (False, False), (False, True)])
def test_sentencepiece_has_scores_and_a_space_before_the_text(prefix: bool, splits: bool) -> None:
    tokenizer = sentencepiece_tokenizer(prefix=prefix, splits=splits)
    found = read_vocabulary(tokenizer, 400)
    assert (found.model, found.space_prefix, found.merges) == ("llama", prefix, ())
    ids = tokenizer.get_vocab()
    assert found.scores[ids["th"]] > found.scores[ids["the"]] > found.scores[ids["that"]]
    assert [found.types[ids[token]] for token in ("<unk>", "<s>", "<0x41>", "th")] == [2, 3, 6, 1]


def test_special_tokens_beyond_the_embeddings_are_left_out(
    decoder: Callable[..., Any], tmp_path: Path
) -> None:
    """As <image_soft_token> in the text models of Gemma 3, which have no embedding of it."""
    tokenizer = sentencepiece_tokenizer()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "<image_soft_token>"})
    assert tokenizer("<image_soft_token>")["input_ids"][-1] == size
    assert read_vocabulary(tokenizer, size) == read_vocabulary(sentencepiece_tokenizer(), size)
    export_gguf(decoder(vocab_size=size), tokenizer, tmp_path / "model.gguf")
    fields = GgufFile(tmp_path / "model.gguf").fields
    assert "tokenizer.ggml.eos_token_id" in fields
    assert "tokenizer.ggml.padding_token_id" not in fields


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "add a space": (
        lambda: byte_level_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "pre-tokenizer is none of",
    ),
    "lower case": (
        lambda: byte_level_tokenizer(normalizer=normalizers.Lowercase()),
        "changes texts by Lowercase",
    ),
    "too many tokens": (byte_level_tokenizer, "has 290 tokens, but the model has 280"),
    "no tokenizer.json": (object, "object has no tokenizer.json"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_tokenizers_are_refused(case: str) -> None:
    make, sentence = REFUSED[case]
    with pytest.raises(UserError, match=f"{sentence}.*leave gguf out of --export"):
        read_vocabulary(make(), 280 if case == "too many tokens" else 320)


def test_the_tiny_wordpiece_tokenizer_is_refused(tiny_tokenizer: Tiny) -> None:
    with pytest.raises(UserError, match="its model is WordPiece, not BPE"):
        read_vocabulary(tiny_tokenizer(), 320)


@pytest.mark.parametrize(
    ("model_type", "config", "sentence"),
    [
        ("gpt2", {}, "llama, mistral, qwen2, qwen3, smollm3, gemma3_text, not a GPT2"),
        ("bert", {"is_decoder": True}, "not a BertLMHeadModel"),
        ("gemma", {}, "not a GemmaForCausalLM"),
        ("qwen3", {}, "with norms of queries and keys, as qwen3 has: add --uniform"),
        ("smollm3", {}, "with layers without rotary positions, as smollm3 has: add --uniform"),
        (
            "gemma3_text",
            GEMMA3,
            "with norms of the outputs of .*, as gemma3_text has: add --uniform",
        ),
        ("llama", {"hidden_act": "gelu"}, "has no activation gelu"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 9.0, "factor": 2.0}},
            "of type dynamic have no fixed frequencies",
        ),
    ],
)
def test_what_llama_cpp_cannot_express_is_refused_before_any_work(
    model_type: str,
    config: dict[str, Any],
    sentence: str,
    decoder: Callable[..., Any],
    tokenizer: Any,
) -> None:
    model = decoder(model_type, **config)
    with pytest.raises(UserError, match=sentence):
        check_gguf(model, tokenizer, ("f16",), Settings())


@pytest.mark.parametrize(
    ("model_type", "config", "sentence"),
    [
        ("smollm3", {"num_hidden_layers": 4}, "every fourth layer has no rotary"),
        ("qwen3", {"attention_bias": True}, "qwen3 has no biases"),
        ("qwen3", {"rope_parameters": LLAMA3}, "no scaled rotary positions"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "every sixth layer has full"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "no soft-capping"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "no soft-capping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attends to earlier tokens only"),
        (
            "gemma3_text",
            {"query_pre_attn_scalar": 16},
            "head's width, 8, .* by that of 16",
        ),
        ("gemma3_text", {"num_hidden_layers": 62}, "except in a model of 62 layers"),
        ("gemma3_text", {"hidden_activation": "silu"}, "gemma3 has no activation silu"),
        ("gemma3_text", {"rope_parameters": GEMMA3_LONG}, "no scaled rotary positions"),
        ("llama", {"hidden_size": 48}, "hidden size that is a multiple of 32, and it is 48"),
    ],
)
def test_what_an_architecture_lacks_is_refused(
    model_type: str,
    config: dict[str, Any],
    sentence: str,
    decoder: Callable[..., Any],
    tokenizer: Any,
) -> None:
    if model_type == "gemma3_text":
        config = GEMMA3 | config
        check_gguf(decoder(model_type, **GEMMA3), tokenizer, ("f16", "q8_0"))
    with pytest.raises(UserError, match=sentence):
        check_gguf(decoder(model_type, **config), tokenizer, ("f16", "q8_0"))


def test_models_that_lose_whole_layers_are_checked(
    decoder: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    whole = Settings(depth="layers")
    model = decoder("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    check_gguf(model, tokenizer, ("f16",), Settings(uniform=True))
    with pytest.raises(UserError, match="every fourth layer .*, and --depth layers moves layers"):
        check_gguf(model, tokenizer, ("f16",), whole)
    with pytest.raises(UserError, match="every sixth layer .*, and --depth layers moves layers"):
        check_gguf(decoder("gemma3_text", **GEMMA3), tokenizer, ("f16",), whole)
    model = decoder("qwen3")
    check_gguf(model, tokenizer, ("f16",), whole)
    short = remove_layers(model, layout_of(model), [1])
    export_gguf(short, tokenizer, tmp_path / "model.gguf")
    assert assert_file_computes(tmp_path / "model.gguf", short, "qwen3").entry("block_count") == 2


def test_unequal_layers_are_noticed_when_they_are_written(
    decoder: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no architecture for layers of unequal sizes"):
        export_gguf(pruned(decoder("qwen3")), tokenizer, tmp_path / "model.gguf")


def test_weights_beyond_half_precision_are_refused(
    decoder: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = decoder()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e5
    with pytest.raises(UserError, match=r"blk.1.ffn_up.weight are too large for --gguf-type f16"):
        export_gguf(model, tokenizer, tmp_path / "model.gguf")


@pytest.fixture
def flags(
    decoder: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    """Flags of a small run in an empty folder, from a language model and a text in another."""
    given = tmp_path / "given"
    decoder(tie_word_embeddings=True).save_pretrained(given / "model")
    tokenizer.save_pretrained(given / "model")
    (given / "data").mkdir()
    for split in ("train", "validation"):
        (given / "data" / f"{split}.txt").write_text("the cat sat on that hat. " * 100)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rfprune.latency.speedup.MAX_ROUNDS", 1)
    monkeypatch.setattr("rfprune.report.plots.RUN_FIGURES", ())
    text = f"--model {given / 'model'} --task language-modeling --data-dir {given / 'data'}"
    text += " --constraint 0.5 --samples 8 --batch-size 4 --max-length 16 --no-cache --skip-tune"
    return f"{text} --export gguf --gguf-type f16 q8_0 --output-dir out".split()


def test_a_run_writes_and_reports_the_files(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without llama-cpp-python they are neither scored nor timed."""
    monkeypatch.setattr("rfprune.export.gguf.is_installed", lambda: False)
    assert main(flags) == 0, capsys.readouterr().err
    exports = read_report(Path("out"))["exports"]
    assert exports.keys() == {"gguf_f16", "gguf_q8_0"}
    for kind in ("f16", "q8_0"):
        entry, path = exports[f"gguf_{kind}"], Path(f"out/gguf/model-{kind}.gguf")
        assert entry == {"path": f"gguf/model-{kind}.gguf", "bytes": path.stat().st_size}
    assert "gguf/model-q8_0.gguf: 0.0" in capsys.readouterr().out
    file = GgufFile(Path("out/gguf/model-f16.gguf"))
    assert file.architecture == "deci"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = load_pruned("out")(input_ids=ids).logits
    found = logits(Path("out/gguf/model-f16.gguf"), ids)
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("fault", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_an_export_that_is_interrupted_leaves_nothing(
    fault: BaseException, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import gguf

    before = set(Path().iterdir())

    def interrupt(_: Any) -> None:
        assert list(Path().rglob("model-f16.gguf")), "the file has been begun"
        raise fault

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", interrupt)
    assert main(flags) == (130 if isinstance(fault, KeyboardInterrupt) else 2)
    assert set(Path().iterdir()) == before


def test_a_refusal_comes_before_the_pruning(
    flags: list[str],
    decoder: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = Path(flags[1])
    decoder("qwen3").save_pretrained(model)
    monkeypatch.setattr("rfprune.cli.run.calibration_batches", None)
    assert main(flags) == 2
    printed = capsys.readouterr().err.splitlines()[-1]
    assert "qwen3 has: add --uniform, or leave gguf out" in printed
    assert not Path("out").exists()


@pytest.mark.llamacpp
def test_a_run_checks_scores_and_times_the_files(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(flags) == 0, capsys.readouterr().err
    report = read_report(Path("out"))
    exports = report["exports"]
    assert exports["gguf_f16"]["score"] == pytest.approx(report["pruned"]["score"], rel=0.01)
    assert exports["gguf_f16"]["divergence"] == pytest.approx(report["divergence"], rel=0.05)
    assert 0 < exports["gguf_f16"]["max_difference"] < 0.1
    assert exports["gguf_q8_0"]["score"] != exports["gguf_f16"]["score"]
    assert exports["gguf_q8_0"]["latency_ms"] > 0
    printed = capsys.readouterr()
    assert "pruned, llama.cpp, q8_0" in printed.out
    assert "llama_" not in printed.err, "llama.cpp prints nothing"


@pytest.mark.llamacpp
@pytest.mark.parametrize(
    ("model_type", "config", "empty"),
    [
        ("llama", {}, ()),
        ("llama", {"tie_word_embeddings": True}, ("layer.1.heads", "layer.2.heads")),
        ("llama", {"attention_bias": True, "mlp_bias": True}, ("layer.1.heads", "layer.2.neurons")),
        ("llama", {"rope_parameters": LLAMA3}, ("layer.0.heads", "layer.2.neurons")),
        ("qwen2", {}, ("layer.2.heads", "layer.1.neurons")),
        ("mistral", {"sliding_window": 64}, ("layer.1.heads", "layer.1.neurons")),
    ],
)
def test_llama_cpp_computes_the_pruned_model(
    model_type: str,
    config: dict[str, Any],
    empty: tuple[str, ...],
    decoder: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    model = pruned(decoder(model_type, **config), *empty)
    assert_llama_cpp_computes(model, tokenizer, tmp_path / "model.gguf")


@pytest.mark.llamacpp
@pytest.mark.parametrize(("model_type", "config", "heads", "_"), PLAIN)
def test_llama_cpp_computes_the_plain_model(
    model_type: str,
    config: dict[str, Any],
    heads: int,
    _: str,
    decoder: Callable[..., Any],
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    plain = plain_model(decoder(model_type, **config), heads)
    assert_llama_cpp_computes(plain, tokenizer, tmp_path / "model.gguf")


def assert_llama_cpp_computes(model: Any, tokenizer: Any, path: Path) -> None:
    from rfprune.export.llama_cpp import LlamaCppModel

    export_gguf(model, tokenizer, path)
    ids = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    runs = LlamaCppModel(path)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    runs(input_ids=ids[:, :7])
    found: Tensor = runs(input_ids=ids)["logits"]
    runs.close()
    # keys and values are kept in half precision
    assert (found - expected).norm() < 0.01 * expected.norm()
    assert torch.equal(found.argmax(-1)[:, -1], expected.argmax(-1)[:, -1])


@pytest.mark.llamacpp
@pytest.mark.parametrize("name", [*PRE_TOKENIZERS, "sentencepiece", "no prefix", "gemma"])
def test_llama_cpp_cuts_texts_as_the_tokenizer_does(
    name: str, decoder: Callable[..., Any], tmp_path: Path
) -> None:
    from llama_cpp import Llama

    if name in PRE_TOKENIZERS:
        tokenizer = byte_level_tokenizer(*STEPS[name], whole_words=PRE_TOKENIZERS[name][1])
    else:
        prefix = name == "sentencepiece"
        tokenizer = sentencepiece_tokenizer(prefix=prefix, splits=name == "gemma")
    export_gguf(decoder(vocab_size=400), tokenizer, tmp_path / "model.gguf")
    llama = Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    text = TEXT.replace(" <tool> ", " ")  # spaces beside such a token differ
    assert llama.tokenize(text.encode(), add_bos=True) == tokenizer(text)["input_ids"]
    llama.close()
