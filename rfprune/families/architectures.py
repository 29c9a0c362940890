"""The supported model families: one row of module paths per model type.

To add a family, add a row; see README.md beside this file. Paths of layers are relative to the base
model (`model.base_model`), paths of a sublayer are relative to its layer.
`rfprune.model.layout.layout_of` finds a model's blocks by its row.
"""

from __future__ import annotations

from dataclasses import replace

from rfprune.families.schema import Architecture, SizeEntries, Stack, Sublayer

_BERT_FFN = Sublayer(
    kind="neuron",
    producers=("intermediate.dense",),
    consumer="output.dense",
    module="intermediate",
    next_norm="output.LayerNorm",
)

_BERT_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.self.query", "attention.self.key", "attention.self.value"),
    consumer="attention.output.dense",
    module="attention.self",
    next_norm="attention.output.LayerNorm",
    returns_tuple=True,
)

_BERT = Architecture(
    (Stack("encoder.layer", (_BERT_ATTENTION, _BERT_FFN)),), size_entries=SizeEntries()
)


def _pre_norm_roberta(ffn_norm: str) -> Architecture:
    """A BERT with norms before its sublayers; the norm of the FFN has this path."""
    sublayers = (
        replace(_BERT_ATTENTION, next_norm=ffn_norm),
        replace(_BERT_FFN, next_norm=None),
    )
    return Architecture(
        (Stack("encoder.layer", sublayers, pre_norm=True),), size_entries=SizeEntries()
    )


_ALBERT_ATTENTION = Sublayer(
    kind="head",
    producers=tuple(f"albert_layers.0.attention.{name}" for name in ("query", "key", "value")),
    consumer="albert_layers.0.attention.dense",
    module="albert_layers.0.attention",
    next_norm="albert_layers.0.attention.LayerNorm",
    returns_tuple=True,
    includes_residual=True,
)

_ALBERT_FFN = Sublayer(
    kind="neuron",
    producers=("albert_layers.0.ffn",),
    consumer="albert_layers.0.ffn_output",
    module="albert_layers.0.ffn",
    next_norm="albert_layers.0.full_layer_layer_norm",
)

_DEBERTA_ATTENTION = replace(
    _BERT_ATTENTION,
    producers=tuple(f"attention.self.{name}_proj" for name in ("query", "key", "value")),
    position_producers=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
)

_DISTILBERT_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    consumer="attention.out_lin",
    module="attention",
    next_norm="sa_layer_norm",
    returns_tuple=True,
)

_DISTILBERT_FFN = Sublayer(
    kind="neuron",
    producers=("ffn.lin1",),
    consumer="ffn.lin2",
    module="ffn",
    next_norm="output_layer_norm",
)

_MPNET_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    consumer="attention.attn.o",
    module="attention.attn",
    next_norm="attention.LayerNorm",
    returns_tuple=True,
    head_bias="position_bias",
)

_MODERNBERT_ATTENTION = Sublayer(
    kind="head",
    producers=("attn.Wqkv",),
    fused=3,
    consumer="attn.Wo",
    module="attn",
    next_norm="mlp_norm",
    returns_tuple=True,
)

_MODERNBERT_FFN = Sublayer(
    kind="neuron",
    producers=("mlp.Wi",),
    fused=2,
    consumer="mlp.Wo",
    module="mlp",
    next_norm=None,
)

_GPT2_ATTENTION = Sublayer(
    kind="head",
    producers=("attn.c_attn",),
    fused=3,
    consumer="attn.c_proj",
    module="attn",
    next_norm="ln_2",
    returns_tuple=True,
)

_GPT2_FFN = Sublayer(
    kind="neuron",
    producers=("mlp.c_fc",),
    consumer="mlp.c_proj",
    module="mlp",
    next_norm=None,
)

_LLAMA_ATTENTION = Sublayer(
    kind="head",
    producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    consumer="self_attn.o_proj",
    module="self_attn",
    next_norm="post_attention_layernorm",
    returns_tuple=True,
)

_LLAMA_FFN = Sublayer(
    kind="neuron",
    producers=("mlp.gate_proj", "mlp.up_proj"),
    consumer="mlp.down_proj",
    module="mlp",
    next_norm=None,
)

_GROUPED_QUERY_SIZES = SizeEntries(heads=("num_key_value_heads", "num_attention_heads"))

_LLAMA = Architecture(
    (Stack("layers", (_LLAMA_ATTENTION, _LLAMA_FFN), pre_norm=True),),
    causal=True,
    size_entries=_GROUPED_QUERY_SIZES,
)

_PHI3_SUBLAYERS = (
    replace(_LLAMA_ATTENTION, producers=("self_attn.qkv_proj",), fused=3),
    replace(_LLAMA_FFN, producers=("mlp.gate_up_proj",), fused=2),
)

_GRANITE_SUBLAYERS = (
    replace(_LLAMA_ATTENTION, layer_scale="residual_multiplier"),
    replace(_LLAMA_FFN, layer_scale="residual_multiplier"),
)

_NOMIC_BERT_SUBLAYERS = (
    _LLAMA_ATTENTION,
    replace(_LLAMA_FFN, next_norm="post_mlp_layernorm"),
)

_GEMMA2_SUBLAYERS = (
    replace(
        _LLAMA_ATTENTION,
        next_norm="pre_feedforward_layernorm",
        output_norm="post_attention_layernorm",
    ),
    replace(_LLAMA_FFN, output_norm="post_feedforward_layernorm"),
)

_GEMMA2 = replace(_LLAMA, stacks=(Stack("layers", _GEMMA2_SUBLAYERS, pre_norm=True),))

_OLMO2_SUBLAYERS = (
    replace(
        _LLAMA_ATTENTION,
        one_unit=True,
        next_norm="mlp",
        output_norm="post_attention_layernorm",
    ),
    replace(_LLAMA_FFN, output_norm="post_feedforward_layernorm"),
)

_OLMO2 = Architecture(
    (Stack("layers", _OLMO2_SUBLAYERS, pre_norm=True),), causal=True, size_entries=SizeEntries()
)

_GPT_NEOX_SUBLAYERS = (
    Sublayer(
        kind="head",
        producers=("attention.query_key_value",),  # queries, keys and values of a head in a row
        consumer="attention.dense",
        module="attention",
        next_norm=None,
        returns_tuple=True,
        parallel=True,
    ),
    Sublayer(
        kind="neuron",
        producers=("mlp.dense_h_to_4h",),
        consumer="mlp.dense_4h_to_h",
        module="mlp",
        next_norm=None,
    ),
)

_OPT_ATTENTION = replace(
    _LLAMA_ATTENTION, consumer="self_attn.out_proj", next_norm="final_layer_norm"
)

_OPT_FFN = Sublayer(kind="neuron", producers=("fc1",), consumer="fc2", module="fc1", next_norm=None)

_BART_ATTENTION = replace(
    _OPT_ATTENTION,
    next_norm="self_attn_layer_norm",
)

_BART_CROSS_ATTENTION = Sublayer(
    kind="head",
    producers=("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj"),
    consumer="encoder_attn.out_proj",
    module="encoder_attn",
    next_norm="encoder_attn_layer_norm",
    returns_tuple=True,
    label="cross_heads",
    encoder_producers=("encoder_attn.k_proj", "encoder_attn.v_proj"),
)

_BART_FFN = replace(_OPT_FFN, next_norm="final_layer_norm")

_BART = Architecture(
    (
        Stack("encoder.layers", (_BART_ATTENTION, _BART_FFN)),
        Stack(
            "decoder.layers",
            (_BART_ATTENTION, _BART_CROSS_ATTENTION, _BART_FFN),
            num_layers_entry="decoder_layers",
        ),
    )
)

_PEGASUS_DECODER = (
    replace(_BART_ATTENTION, next_norm="encoder_attn_layer_norm"),
    replace(_BART_CROSS_ATTENTION, next_norm="final_layer_norm"),
    _OPT_FFN,
)

_PEGASUS = Architecture(
    (
        Stack("encoder.layers", (_OPT_ATTENTION, _OPT_FFN), pre_norm=True),
        Stack("decoder.layers", _PEGASUS_DECODER, pre_norm=True, num_layers_entry="decoder_layers"),
    )
)

_T5_ATTENTION = Sublayer(
    kind="head",
    producers=tuple(f"layer.0.SelfAttention.{name}" for name in "qkv"),
    consumer="layer.0.SelfAttention.o",
    module="layer.0.SelfAttention",
    next_norm="layer.1.layer_norm",
    returns_tuple=True,
    returns_position_bias=True,
    position_bias_table="layer.0.SelfAttention.relative_attention_bias",
)

_T5_CROSS_ATTENTION = Sublayer(
    kind="head",
    producers=tuple(f"layer.1.EncDecAttention.{name}" for name in "qkv"),
    consumer="layer.1.EncDecAttention.o",
    module="layer.1.EncDecAttention",
    next_norm="layer.2.layer_norm",
    returns_tuple=True,
    label="cross_heads",
    returns_position_bias=True,
    encoder_producers=("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
)


def _t5_ffn(place: int) -> Sublayer:
    """The FFN, which comes last in a layer."""
    module = f"layer.{place}.DenseReluDense"
    return Sublayer(
        kind="neuron",
        producers=(f"{module}.wi",),
        gated_producers=(f"{module}.wi_0", f"{module}.wi_1"),
        consumer=f"{module}.wo",
        module=module,
        next_norm=None,
    )


_T5 = Architecture(
    (
        Stack(
            "encoder.block",
            (_T5_ATTENTION, _t5_ffn(1)),
            pre_norm=True,
            layer_output_length=3,
            first_layer_stays=True,
        ),
        Stack(
            "decoder.block",
            (_T5_ATTENTION, _T5_CROSS_ATTENTION, _t5_ffn(2)),
            pre_norm=True,
            layer_output_length=3,
            num_layers_entry="num_decoder_layers",
            first_layer_stays=True,
        ),
    ),
    size_entries=SizeEntries(neurons="d_ff"),
)

_UMT5_ATTENTION = replace(_T5_ATTENTION, returns_position_bias=False)

_UMT5_CROSS_ATTENTION = replace(_T5_CROSS_ATTENTION, returns_position_bias=False)

_UMT5 = Architecture(
    (
        Stack("encoder.block", (_UMT5_ATTENTION, _t5_ffn(1)), pre_norm=True),
        Stack(
            "decoder.block",
            (_UMT5_ATTENTION, _UMT5_CROSS_ATTENTION, _t5_ffn(2)),
            pre_norm=True,
            num_layers_entry="num_decoder_layers",
        ),
    ),
    size_entries=SizeEntries(neurons="d_ff"),
)

_VIT_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    consumer="attention.o_proj",
    module="attention",
    next_norm="layernorm_after",
    returns_tuple=True,
)

_VIT_FFN = Sublayer(
    kind="neuron", producers=("mlp.fc1",), consumer="mlp.fc2", module="mlp", next_norm=None
)

_VIT = Architecture(
    (Stack("layers", (_VIT_ATTENTION, _VIT_FFN), pre_norm=True),), size_entries=SizeEntries()
)

_WAV2VEC2_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    consumer="attention.out_proj",
    module="attention",
    next_norm="layer_norm",
    returns_tuple=True,
)

_WAV2VEC2_FFN = Sublayer(
    kind="neuron",
    producers=("feed_forward.intermediate_dense",),
    consumer="feed_forward.output_dense",
    module="feed_forward",
    next_norm="final_layer_norm",
)

_STABLE_WAV2VEC2_SUBLAYERS = (
    replace(_WAV2VEC2_ATTENTION, next_norm="final_layer_norm"),
    replace(_WAV2VEC2_FFN, next_norm=None),
)

_WAV2VEC2 = Architecture(
    (Stack("encoder.layers", (_WAV2VEC2_ATTENTION, _WAV2VEC2_FFN)),),
    stable_stacks=(Stack("encoder.layers", _STABLE_WAV2VEC2_SUBLAYERS, pre_norm=True),),
    required_config={"adapter_attn_dim": None, "add_adapter": False},
    size_entries=SizeEntries(),
)

_CLIP_SUBLAYERS = (
    replace(_LLAMA_ATTENTION, consumer="self_attn.out_proj", next_norm="layer_norm2"),
    _VIT_FFN,
)

_CLIP = Architecture(
    (Stack("encoder.layers", _CLIP_SUBLAYERS, pre_norm=True),),
    size_entries=SizeEntries(),
    has_pooled_embeddings=True,
)

_BEIT_SUBLAYERS = (
    replace(_VIT_ATTENTION, layer_scale="lambda_1", head_bias="attention_mask"),
    replace(_VIT_FFN, layer_scale="lambda_2"),
)

_DINOV2_SUBLAYERS = (
    replace(_VIT_ATTENTION, next_norm="norm2", layer_scale="layer_scale1.lambda1"),
    replace(_VIT_FFN, layer_scale="layer_scale2.lambda1"),
)

_DINOV2 = Architecture(
    (Stack("encoder.layer", _DINOV2_SUBLAYERS, pre_norm=True),),
    required_config={"use_swiglu_ffn": False},
)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "ernie": _BERT,
    "electra": _BERT,
    "data2vec-text": _BERT,
    "roberta-prelayernorm": _pre_norm_roberta("intermediate.LayerNorm"),
    "xlm-roberta-xl": _pre_norm_roberta("LayerNorm"),
    "albert": Architecture(
        (Stack("encoder.albert_layer_groups", (_ALBERT_ATTENTION, _ALBERT_FFN), shared=True),),
        required_config={"inner_group_num": 1},
        size_entries=SizeEntries(),
    ),
    "deberta-v2": Architecture(
        (Stack("encoder.layer", (_DEBERTA_ATTENTION, _BERT_FFN), layer_output_length=2),),
        required_config={"conv_kernel_size": 0},
        size_entries=SizeEntries(),
    ),
    "distilbert": Architecture(
        (Stack("transformer.layer", (_DISTILBERT_ATTENTION, _DISTILBERT_FFN)),),
        size_entries=SizeEntries(neurons="hidden_dim"),
    ),
    "mpnet": Architecture(
        (Stack("encoder.layer", (_MPNET_ATTENTION, _BERT_FFN), layer_output_length=1),),
        size_entries=SizeEntries(),
    ),
    "nomic_bert": Architecture(
        (Stack("layers", _NOMIC_BERT_SUBLAYERS),),
        size_entries=SizeEntries(heads=("num_attention_heads",)),
    ),
    "eurobert": replace(_LLAMA, causal=False),
    "modernbert": Architecture(
        (
            Stack(
                "layers",
                (_MODERNBERT_ATTENTION, _MODERNBERT_FFN),
                pre_norm=True,
                first_layer_stays=True,
            ),
        ),
        size_entries=SizeEntries(),
    ),
    "gpt2": Architecture(
        (Stack("h", (_GPT2_ATTENTION, _GPT2_FFN), pre_norm=True),),
        causal=True,
        size_entries=SizeEntries(neurons="n_inner"),
    ),
    "gpt_neox": Architecture(
        (Stack("layers", _GPT_NEOX_SUBLAYERS, pre_norm=True),),
        causal=True,
        required_config={"use_parallel_residual": True},
        size_entries=SizeEntries(),
    ),
    "opt": Architecture(
        (Stack("decoder.layers", (_OPT_ATTENTION, _OPT_FFN), pre_norm=True),),
        causal=True,
        required_config={"do_layer_norm_before": True},
        size_entries=SizeEntries(neurons="ffn_dim"),
    ),
    "bart": _BART,
    "marian": _BART,
    "pegasus": _PEGASUS,
    "mbart": _PEGASUS,
    "m2m_100": _PEGASUS,
    "whisper": _PEGASUS,
    "t5": _T5,
    "mt5": _T5,
    "umt5": _UMT5,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA2,
    "phi3": replace(_LLAMA, stacks=(Stack("layers", _PHI3_SUBLAYERS, pre_norm=True),)),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "granite": replace(_LLAMA, stacks=(Stack("layers", _GRANITE_SUBLAYERS, pre_norm=True),)),
    "starcoder2": Architecture(
        (Stack("layers", (_LLAMA_ATTENTION, _GPT2_FFN), pre_norm=True),),
        causal=True,
        size_entries=_GROUPED_QUERY_SIZES,
    ),
    "stablelm": replace(
        _LLAMA,
        required_config={"use_parallel_residual": False, "qk_layernorm": False},
        size_entries=SizeEntries(),
    ),
    "vit": _VIT,
    "deit": _VIT,
    "beit": Architecture(
        (Stack("layers", _BEIT_SUBLAYERS, pre_norm=True),), size_entries=SizeEntries()
    ),
    "clip_text_model": replace(_CLIP, causal=True),
    "clip_vision_model": _CLIP,
    "siglip_text_model": _CLIP,
    "siglip_vision_model": replace(_CLIP, size_entries=None),  # its pooler has the FFN's size, too
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
    "wav2vec2": _WAV2VEC2,
    "hubert": _WAV2VEC2,
}
"""By model type."""
