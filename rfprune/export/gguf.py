"""The GGUF export: one file that stock llama.cpp loads, layers of unequal sizes included.

llama.cpp's architecture "deci" is a LLaMA whose layers have their own numbers of heads and neurons.
A model with equal layers is written as its family's own architecture. What differs from
transformers:

- Rotary positions turn neighbouring features in "llama" and "deci", and the two halves of a head in
  transformers, so the rows of queries and keys change places.
- A layer of "deci" without neurons is skipped whole, its attention included: it gets neurons of
  zeros. A layer without heads has neither an attention nor its norm, unless it is the first, whose
  heads llama.cpp takes the model's sizes from, or has a bias: it gets heads of zeros.
- Quantised rows are multiples of 32 values: numbers of neurons are rounded up with zeros.
- Gemma's norms multiply by 1 + weight, llama.cpp's by the weight.

The package gguf is imported inside the functions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rfprune.errors import UserError
from rfprune.export.contract import Export, ExportJob, check_outputs
from rfprune.export.gguf_vocabulary import add_vocabulary, read_vocabulary
from rfprune.export.llama_cpp import LlamaCppModel, is_installed
from rfprune.settings import Settings

QUANTIZED_BLOCK = 32
"""Values of a row that share a scale in q8_0 and q4_0."""

UNEQUAL = "deci"
"""llama.cpp's architecture for layers of unequal sizes."""

ROTARY_FACTORS = "rope_freqs.weight"

GEMMA3_27B_LAYERS = 62
"""llama.cpp takes a model of this many layers for Gemma 3 27B, and scales its attention scores
differently."""

FIXED_ROTARY_TYPES = ("default", "linear", "llama3")
"""Rotary positions whose frequencies depend neither on the text nor on its length."""


@dataclass(frozen=True)
class GgufFamily:
    """A model type that llama.cpp knows.

    Attributes:
        architecture: its name in llama.cpp.
        interleaved: whether that architecture turns neighbouring features.
        only_equal: what the architecture for unequal layers lacks, if anything. Such a family has
            neither biases of projections nor scaled rotary positions in llama.cpp.
        activation: of the FFN.
        norm_offset: added to the weights of norms in the file.
        sliding_window: whether the file has an entry for it. Without one, the context length is
            limited to the window.
        pattern: how the layers differ, which llama.cpp fixes by their numbers; "" if they do not.
        period: every such layer has what `pattern` says.
    """

    architecture: str
    interleaved: bool = True
    only_equal: str = ""
    activation: str = "silu"
    norm_offset: float = 0.0
    sliding_window: bool = False
    pattern: str = ""
    period: int = 0


GGUF_FAMILIES: Mapping[str, GgufFamily] = {
    "llama": GgufFamily("llama"),
    "mistral": GgufFamily("llama"),
    "qwen2": GgufFamily("qwen2", interleaved=False),
    "qwen3": GgufFamily("qwen3", interleaved=False, only_equal="norms of queries and keys"),
    "smollm3": GgufFamily(
        "smollm3",
        only_equal="layers without rotary positions",
        pattern="every fourth layer has no rotary positions",
        period=4,
    ),
    "gemma3_text": GgufFamily(
        "gemma3",
        interleaved=False,
        only_equal="norms of the outputs of attention and FFN",
        activation="gelu_pytorch_tanh",
        norm_offset=1.0,
        sliding_window=True,
        pattern="every sixth layer has full attention, and the others a sliding window",
        period=6,
    ),
}
"""By model type."""


@dataclass(frozen=True)
class LayerSizes:
    """Query heads, key-value heads and neurons of one layer of the file."""

    heads: int
    kv_heads: int
    neurons: int


@dataclass(frozen=True)
class GgufModel:
    """A model in llama.cpp's terms.

    Attributes:
        architecture: its name in llama.cpp.
        layers: their sizes.
        tensors: in float32, by llama.cpp's names; weights are (outputs, inputs).
    """

    architecture: str
    layers: tuple[LayerSizes, ...]
    tensors: Mapping[str, Tensor]


def check_gguf(
    model: Any, tokenizer: Any, kinds: tuple[str, ...], settings: Settings | None = None
) -> None:
    """Check that a model can be written as GGUF.

    Args:
        model: before or after pruning.
        tokenizer: the model's.
        kinds: those of `settings.GGUF_TYPES` that are wanted.
        settings: those with which it will be pruned; None if it is written as it is.

    Raises:
        UserError: it cannot; the message has the reason.
    """
    config, name = model.config, type(model).__name__
    family = GGUF_FAMILIES.get(config.model_type)
    if family is None or not name.endswith("ForCausalLM"):
        known = ", ".join(GGUF_FAMILIES)
        raise _refusal(f"GGUF files are written for language models of type {known}, not a {name}")
    equal_layers = settings is None or settings.uniform or settings.depth == "layers"
    if family.only_equal and not equal_layers:
        raise _unequal_refusal(config.model_type, family)
    activation = getattr(config, "hidden_act", None) or config.hidden_activation
    if activation != family.activation:
        raise _refusal(f"llama.cpp's {family.architecture} has no activation {activation}")
    has_biases = any(getattr(config, name, False) for name in ("attention_bias", "mlp_bias"))
    if family.only_equal and has_biases:
        raise _refusal(f"llama.cpp's {family.architecture} has no biases of projections")
    if family.pattern and not _follows_pattern(config, family.period):
        raise _refusal(f"in llama.cpp's {family.architecture} {family.pattern}")
    if family.pattern and settings is not None and settings.depth != "off":
        raise _refusal(
            f"in llama.cpp's {family.architecture} {family.pattern}, and "
            f"--depth {settings.depth} moves layers"
        )
    if config.model_type == "gemma3_text":
        _check_gemma3_attention(config)
    if rotary_factors(model) is not None and family.only_equal:
        raise _refusal(f"llama.cpp's {family.architecture} has no scaled rotary positions")
    if kinds != ("f16",) and config.hidden_size % QUANTIZED_BLOCK:
        raise UserError(
            f"--gguf-type {' '.join(kinds)} needs a hidden size that is a multiple of "
            f"{QUANTIZED_BLOCK}, and it is {config.hidden_size}: use --gguf-type f16"
        )
    read_vocabulary(tokenizer, config.vocab_size)


def _follows_pattern(config: Any, period: int) -> bool:
    """Whether the layers with the numbers period, 2 period, ... differ from the others."""
    if config.model_type == "smollm3":
        differs = [not has_rotary for has_rotary in config.no_rope_layers]
    else:
        differs = [kind == "full_attention" for kind in config.layer_types]
    return differs == [number % period == 0 for number in range(1, len(differs) + 1)]


def _check_gemma3_attention(config: Any) -> None:
    """Refuse what differs from the released text models, for which llama.cpp's gemma3 is made."""
    if config.attn_logit_softcapping or config.final_logit_softcapping:
        raise _refusal("GGUF files of Gemma 3 have no soft-capping")
    if config.use_bidirectional_attention:
        raise _refusal("in llama.cpp's gemma3 a token attends to earlier tokens only")
    divisor = config.query_pre_attn_scalar
    if divisor != config.head_dim or config.num_hidden_layers == GEMMA3_27B_LAYERS:
        raise _refusal(
            "llama.cpp's gemma3 divides attention scores by the square root of the head's width, "
            f"{config.head_dim}, except in a model of {GEMMA3_27B_LAYERS} layers; this model has "
            f"{config.num_hidden_layers} layers, and divides them by that of {divisor}"
        )


def _refusal(reason: str) -> UserError:
    return UserError(f"{reason}: leave gguf out of --export")


def _unequal_refusal(model_type: str, family: GgufFamily) -> UserError:
    return UserError(
        f"llama.cpp has no architecture for layers of unequal sizes with {family.only_equal}, as "
        f"{model_type} has: add --uniform, or leave gguf out of --export"
    )


def rotary_factors(model: Any) -> Tensor | None:
    """What the frequencies of rotary positions are divided by, (D / 2,); None: by 1.

    Where they depend on the kind of layer (Gemma 3): those of the first kind with other than 1.

    Raises:
        UserError: they depend on the length of the text, or turn a part of the features.
    """
    config, width = model.config, head_width(model.config)
    rotary = type(model.base_model.rotary_emb)(config=config)  # the model's may have been rounded
    powers = torch.arange(0, width, 2, dtype=torch.float64) / width
    for layer_type, settings in _rotary_settings(config).items():
        if layer_type and layer_type not in config.layer_types:
            continue
        kind = settings.get("rope_type", "default")
        if kind not in FIXED_ROTARY_TYPES:
            raise _refusal(f"rotary positions of type {kind} have no fixed frequencies")
        scaled = getattr(rotary, f"{layer_type}_inv_freq" if layer_type else "inv_freq").double()
        if 2 * len(scaled) != width:
            raise _refusal(f"rotary positions turn {2 * len(scaled)} of {width} features of a head")
        factors: Tensor = settings["rope_theta"] ** -powers / scaled
        if bool(((factors - 1).abs() >= 1e-6).any()):
            return factors.float()
    return None


def _rotary_settings(config: Any) -> Mapping[str, Mapping[str, Any]]:
    """The entry rope_parameters by type of layer; under "" if all layers share it."""
    found: Mapping[str, Any] = config.rope_parameters
    return {"": found} if "rope_theta" in found else found


def head_width(config: Any) -> int:
    """Features of one head."""
    return int(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )


def to_gguf(model: Any, *, row_multiple: int = 1) -> GgufModel:
    """Names, places and sizes of a model's weights as llama.cpp has them.

    Args:
        model: of a family in `GGUF_FAMILIES`, pruned or not, on any device; it is not changed.
        row_multiple: round numbers of neurons up to a multiple of this.

    Raises:
        UserError: its layers have unequal sizes, and its family cannot have them.
    """
    config = model.config
    family, factors = GGUF_FAMILIES[config.model_type], rotary_factors(model)
    states = [
        _filled_up(layer.state_dict(), config, row_multiple, is_first=number == 0)
        for number, layer in enumerate(model.base_model.layers)
    ]
    layers = tuple(_sizes(state, head_width(config)) for state in states)
    own = _is_own_architecture(family, layers, config, factors)
    if not own and family.only_equal:
        raise _unequal_refusal(config.model_type, family)
    if not own or family.interleaved:
        states = [_interleaved(state, sizes) for state, sizes in zip(states, layers, strict=True)]
    weights = {
        f"model.layers.{number}.{name}": values
        for number, state in enumerate(states)
        for name, values in state.items()
    }
    weights |= {
        name: values
        for name, values in model.state_dict().items()
        if not name.startswith("model.layers.")
    }
    if family.norm_offset:
        weights = {
            name: values.float() + family.norm_offset if name.endswith("norm.weight") else values
            for name, values in weights.items()
        }
    if model.get_output_embeddings().weight is model.get_input_embeddings().weight:
        del weights["lm_head.weight"]  # llama.cpp then takes the embeddings
    architecture = family.architecture if own else UNEQUAL
    tensors = _renamed(weights, architecture, len(layers))
    if factors is not None:
        tensors[ROTARY_FACTORS] = factors
    return GgufModel(architecture, layers, tensors)


def _is_own_architecture(
    family: GgufFamily, layers: Sequence[LayerSizes], config: Any, factors: Tensor | None
) -> bool:
    """Whether a family's own architecture in llama.cpp can express these sizes."""
    if len(set(layers)) > 1:
        return False
    if family.architecture == "qwen2":  # heads fill the hidden size, and frequencies are not scaled
        return layers[0].heads * head_width(config) == config.hidden_size and factors is None
    return True


def _filled_up(
    state: Mapping[str, Tensor], config: Any, row_multiple: int, *, is_first: bool
) -> dict[str, Tensor]:
    """The weights of a layer, with zeros where llama.cpp needs weights that the layer lacks."""
    filled = dict(state)
    width = head_width(config)
    output, down = state["self_attn.o_proj.weight"], state["mlp.down_proj.weight"]
    hidden_size = len(output)
    if output.shape[1] == 0 and (is_first or "self_attn.o_proj.bias" in state):
        rows = width * (config.num_attention_heads // config.num_key_value_heads)
        filled["self_attn.o_proj.weight"] = output.new_zeros(hidden_size, rows)
        for name, size in (("q", rows), ("k", width), ("v", width)):
            filled[f"self_attn.{name}_proj.weight"] = output.new_zeros(size, hidden_size)
    elif output.shape[1] == 0:
        del filled["self_attn.o_proj.weight"], filled["input_layernorm.weight"]
    neurons = down.shape[1]
    missing = -neurons % row_multiple if neurons else QUANTIZED_BLOCK
    filled["mlp.down_proj.weight"] = pad(down, (0, missing))
    for name in ("gate", "up"):
        rows_of = f"mlp.{name}_proj.weight"
        weight = state.get(rows_of, down.new_zeros(0, hidden_size))
        filled[rows_of] = pad(weight, (0, 0, 0, missing))
        if f"mlp.{name}_proj.bias" in state:
            filled[f"mlp.{name}_proj.bias"] = pad(state[f"mlp.{name}_proj.bias"], (0, missing))
    return filled


def _sizes(state: Mapping[str, Tensor], width: int) -> LayerSizes:
    heads, kv_heads = (
        len(state.get(f"self_attn.{name}_proj.weight", ())) // width for name in ("q", "k")
    )
    return LayerSizes(heads, kv_heads, state["mlp.down_proj.weight"].shape[1])


def _interleaved(state: Mapping[str, Tensor], sizes: LayerSizes) -> dict[str, Tensor]:
    """With the rotary pairs of queries and keys side by side."""
    heads = {"self_attn.q_proj": sizes.heads, "self_attn.k_proj": sizes.kv_heads}
    return {
        name: side_by_side(values, heads[module])
        if (module := name.rpartition(".")[0]) in heads
        else values
        for name, values in state.items()
    }


def side_by_side(values: Tensor, heads: int) -> Tensor:
    """Rows (or entries) of heads, first halves then second halves -> the two in turn."""
    rows = len(values)
    halves = values.reshape(heads, 2, rows // heads // 2, *values.shape[1:])
    return halves.transpose(1, 2).reshape(values.shape)


def _renamed(
    weights: Mapping[str, Tensor], architecture: str, num_layers: int
) -> dict[str, Tensor]:
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    ids = {name: number for number, name in MODEL_ARCH_NAMES.items()}
    names = get_tensor_name_map(ids[architecture], num_layers)
    return {
        str(names.get_name(name, (".weight", ".bias"))): values.to("cpu", torch.float32)
        for name, values in weights.items()
    }


def write_gguf(folder: Path, job: ExportJob) -> dict[str, Export]:
    """Write folder/gguf/model-TYPE.gguf for each type of the job.

    They are run if llama-cpp-python is installed.

    Raises:
        UserError: GGUF cannot express the model, or a file computes something else.
    """
    path = folder / "gguf"
    path.mkdir()
    pruned = job.pruned_on_cpu
    exports: dict[str, Export] = {}
    for kind in job.gguf_types:
        file = path / f"model-{kind}.gguf"
        export_gguf(pruned, job.tokenizer, file, kind)
        runtime = LlamaCppModel(file, pruned.config) if is_installed() else None
        difference: dict[str, Any] = {}
        if runtime is not None and kind == "f16":
            difference = check_outputs("gguf", pruned, runtime, job.batches, torch.float16)
        exports[f"gguf_{kind}"] = Export(
            f"{path.name}/{file.name}", file.stat().st_size, difference, runtime
        )
    return exports


def export_gguf(model: Any, tokenizer: Any, path: Path, kind: str = "f16") -> None:
    """Write a language model as one GGUF file, with its tokenizer.

    Args:
        model: pruned or not, on any device; it is not changed.
        tokenizer: the model's.
        kind: of the weights, one of `settings.GGUF_TYPES`. Norms and biases stay in float32; with
            q4_0 the embeddings are q8_0.

    Raises:
        UserError: GGUF cannot express the model.
    """
    import gguf

    check_gguf(model, tokenizer, (kind,))
    made = to_gguf(model, row_multiple=1 if kind == "f16" else QUANTIZED_BLOCK)
    writer = gguf.GGUFWriter(path, made.architecture)
    try:
        _add_sizes(writer, model.config, made.layers)
        writer.add_file_type(int(gguf.LlamaFileType[f"MOSTLY_{kind.upper()}"]))
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_vocabulary(writer, tokenizer, model.config.vocab_size)
        for name, values in made.tensors.items():
            stored = gguf.GGMLQuantizationType[stored_as(name, values, kind).upper()]
            writer.add_tensor(
                name, gguf.quantize(_finite(name, values, kind), stored), raw_dtype=stored
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def stored_as(name: str, values: Tensor, kind: str) -> str:
    """The type in which a tensor is stored: "f32", "f16", "q8_0" or "q4_0"."""
    if values.dim() == 1:
        return "f32"
    if values.shape[1] % QUANTIZED_BLOCK:  # of heads; numbers of neurons are rounded up
        return "f16"
    if kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
        return "q8_0"
    return kind


def _finite(name: str, values: Tensor, kind: str) -> Any:
    """The values as an array."""
    if float(values.abs().max()) > torch.finfo(torch.float16).max and values.dim() > 1:
        raise UserError(
            f"the weights of {name} are too large for --gguf-type {kind}: leave gguf out of "
            "--export"
        )
    return values.numpy()


def _add_sizes(writer: Any, config: Any, layers: Sequence[LayerSizes]) -> None:
    width, family = head_width(config), GGUF_FAMILIES[config.model_type]
    rotary = _rotary_settings(config)
    window = getattr(config, "sliding_window", None)
    context = config.max_position_embeddings
    if family.sliding_window:
        writer.add_sliding_window(window)
        writer.add_rope_freq_base_swa(rotary["sliding_attention"]["rope_theta"])
    elif window:
        context = min(window, context)
    if Path(config.name_or_path).name:
        writer.add_name(Path(config.name_or_path).name)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(layers))
    for add, numbers in (
        (writer.add_head_count, [layer.heads for layer in layers]),
        (writer.add_head_count_kv, [layer.kv_heads for layer in layers]),
        (writer.add_feed_forward_length, [layer.neurons for layer in layers]),
    ):
        add(numbers[0] if len(set(layers)) == 1 else numbers)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base((rotary.get("full_attention") or rotary[""])["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
