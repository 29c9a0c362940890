"""Where each model family keeps its prunable projections: data, one row a family.

To add a family, add a row (`scripts/inspect_architecture.py` suggests one). Paths of layers are
relative to the base model (`model.base_model`), paths of a sublayer are relative to its layer.
`rfprune.model.layout.layout_of` turns a row and a model into blocks.
"""

from __future__ import annotations

from dataclasses import replace

from rfprune.families.schema import Architecture, Stack, Sublayer

_BERT_FFN = Sublayer(
    kind="neuron",
    producers=("intermediate.dense",),
    consumer="output.dense",
    inner="intermediate",
    residual_sum="output.LayerNorm",
)

_BERT_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.self.query", "attention.self.key", "attention.self.value"),
    consumer="attention.output.dense",
    inner="attention.self",
    residual_sum="attention.output.LayerNorm",
    inner_returns_tuple=True,
)

_BERT = Architecture((Stack("encoder.layer", (_BERT_ATTENTION, _BERT_FFN)),))

_ALBERT_ATTENTION = Sublayer(
    kind="head",
    producers=tuple(f"albert_layers.0.attention.{name}" for name in ("query", "key", "value")),
    consumer="albert_layers.0.attention.dense",
    inner="albert_layers.0.attention",
    residual_sum="albert_layers.0.attention.LayerNorm",
    inner_returns_tuple=True,
    bypass="normed",
)

_ALBERT_FFN = Sublayer(
    kind="neuron",
    producers=("albert_layers.0.ffn",),
    consumer="albert_layers.0.ffn_output",
    inner="albert_layers.0.ffn",
    residual_sum="albert_layers.0.full_layer_layer_norm",
)

_DEBERTA_ATTENTION = replace(
    _BERT_ATTENTION,
    producers=tuple(f"attention.self.{name}_proj" for name in ("query", "key", "value")),
    positions=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
)

_DISTILBERT_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    consumer="attention.out_lin",
    inner="attention",
    residual_sum="sa_layer_norm",
    inner_returns_tuple=True,
)

_DISTILBERT_FFN = Sublayer(
    kind="neuron",
    producers=("ffn.lin1",),
    consumer="ffn.lin2",
    inner="ffn",
    residual_sum="output_layer_norm",
)

_MPNET_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    consumer="attention.attn.o",
    inner="attention.attn",
    residual_sum="attention.LayerNorm",
    inner_returns_tuple=True,
    head_bias="position_bias",
)

_MODERNBERT_ATTENTION = Sublayer(
    kind="head",
    producers=("attn.Wqkv",),
    fused=3,
    consumer="attn.Wo",
    inner="attn",
    residual_sum="mlp_norm",
    inner_returns_tuple=True,
)

_MODERNBERT_FFN = Sublayer(
    kind="neuron",
    producers=("mlp.Wi",),
    fused=2,
    consumer="mlp.Wo",
    inner="mlp",
    residual_sum=None,
)

_GPT2_ATTENTION = Sublayer(
    kind="head",
    producers=("attn.c_attn",),
    fused=3,
    consumer="attn.c_proj",
    inner="attn",
    residual_sum="ln_2",
    inner_returns_tuple=True,
)

_GPT2_FFN = Sublayer(
    kind="neuron",
    producers=("mlp.c_fc",),
    consumer="mlp.c_proj",
    inner="mlp",
    residual_sum=None,
)

_LLAMA_ATTENTION = Sublayer(
    kind="head",
    producers=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    consumer="self_attn.o_proj",
    inner="self_attn",
    residual_sum="post_attention_layernorm",
    inner_returns_tuple=True,
)

_LLAMA_FFN = Sublayer(
    kind="neuron",
    producers=("mlp.gate_proj", "mlp.up_proj"),
    consumer="mlp.down_proj",
    inner="mlp",
    residual_sum=None,
)

_LLAMA = Architecture(
    (Stack("layers", (_LLAMA_ATTENTION, _LLAMA_FFN), pre_norm=True),), causal=True
)

_OPT_ATTENTION = replace(
    _LLAMA_ATTENTION, consumer="self_attn.out_proj", residual_sum="final_layer_norm"
)

_OPT_FFN = Sublayer(
    kind="neuron", producers=("fc1",), consumer="fc2", inner="fc1", residual_sum=None
)

_BART_ATTENTION = replace(
    _OPT_ATTENTION,
    residual_sum="self_attn_layer_norm",
)

_BART_CROSS_ATTENTION = Sublayer(
    kind="head",
    producers=("encoder_attn.q_proj", "encoder_attn.k_proj", "encoder_attn.v_proj"),
    consumer="encoder_attn.out_proj",
    inner="encoder_attn",
    residual_sum="encoder_attn_layer_norm",
    inner_returns_tuple=True,
    label="cross_heads",
    from_encoder=("encoder_attn.k_proj", "encoder_attn.v_proj"),
)

_BART_FFN = replace(_OPT_FFN, residual_sum="final_layer_norm")

_BART = Architecture(
    (
        Stack("encoder.layers", (_BART_ATTENTION, _BART_FFN)),
        Stack("decoder.layers", (_BART_ATTENTION, _BART_CROSS_ATTENTION, _BART_FFN)),
    )
)

_PEGASUS_DECODER = (
    replace(_BART_ATTENTION, residual_sum="encoder_attn_layer_norm"),
    replace(_BART_CROSS_ATTENTION, residual_sum="final_layer_norm"),
    _OPT_FFN,
)

_PEGASUS = Architecture(
    (
        Stack("encoder.layers", (_OPT_ATTENTION, _OPT_FFN), pre_norm=True),
        Stack("decoder.layers", _PEGASUS_DECODER, pre_norm=True),
    )
)

_T5_ATTENTION = Sublayer(
    kind="head",
    producers=tuple(f"layer.0.SelfAttention.{name}" for name in "qkv"),
    consumer="layer.0.SelfAttention.o",
    inner="layer.0.SelfAttention",
    residual_sum="layer.1.layer_norm",
    inner_returns_tuple=True,
    bypass="biased",
    bias_table="layer.0.SelfAttention.relative_attention_bias",
)

_T5_CROSS_ATTENTION = Sublayer(
    kind="head",
    producers=tuple(f"layer.1.EncDecAttention.{name}" for name in "qkv"),
    consumer="layer.1.EncDecAttention.o",
    inner="layer.1.EncDecAttention",
    residual_sum="layer.2.layer_norm",
    inner_returns_tuple=True,
    label="cross_heads",
    bypass="biased",
    from_encoder=("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
)


def _t5_ffn(place: int) -> Sublayer:
    """The FFN, which comes last in a layer."""
    inner = f"layer.{place}.DenseReluDense"
    return Sublayer(
        kind="neuron",
        producers=(f"{inner}.wi",),
        gated=(f"{inner}.wi_0", f"{inner}.wi_1"),
        consumer=f"{inner}.wo",
        inner=inner,
        residual_sum=None,
    )


_T5 = Architecture(
    (
        Stack("encoder.block", (_T5_ATTENTION, _t5_ffn(1)), pre_norm=True, returns=3),
        Stack(
            "decoder.block",
            (_T5_ATTENTION, _T5_CROSS_ATTENTION, _t5_ffn(2)),
            pre_norm=True,
            returns=3,
        ),
    )
)

_VIT_ATTENTION = Sublayer(
    kind="head",
    producers=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    consumer="attention.o_proj",
    inner="attention",
    residual_sum="layernorm_after",
    inner_returns_tuple=True,
)

_VIT_FFN = Sublayer(
    kind="neuron", producers=("mlp.fc1",), consumer="mlp.fc2", inner="mlp", residual_sum=None
)

_VIT = Architecture((Stack("layers", (_VIT_ATTENTION, _VIT_FFN), pre_norm=True),))

_BEIT_SUBLAYERS = (
    replace(_VIT_ATTENTION, scale="lambda_1", head_bias="attention_mask"),
    replace(_VIT_FFN, scale="lambda_2"),
)

_DINOV2_SUBLAYERS = (
    replace(_VIT_ATTENTION, residual_sum="norm2", scale="layer_scale1.lambda1"),
    replace(_VIT_FFN, scale="layer_scale2.lambda1"),
)

_DINOV2 = Architecture(
    (Stack("encoder.layer", _DINOV2_SUBLAYERS, pre_norm=True),), needed={"use_swiglu_ffn": False}
)

ARCHITECTURES: dict[str, Architecture] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "ernie": _BERT,
    "electra": _BERT,
    "albert": Architecture(
        (Stack("encoder.albert_layer_groups", (_ALBERT_ATTENTION, _ALBERT_FFN), shared=True),),
        needed={"inner_group_num": 1},
    ),
    "deberta-v2": Architecture(
        (Stack("encoder.layer", (_DEBERTA_ATTENTION, _BERT_FFN), returns=2),),
        needed={"conv_kernel_size": 0},
    ),
    "distilbert": Architecture(
        (Stack("transformer.layer", (_DISTILBERT_ATTENTION, _DISTILBERT_FFN)),)
    ),
    "mpnet": Architecture((Stack("encoder.layer", (_MPNET_ATTENTION, _BERT_FFN), returns=1),)),
    "modernbert": Architecture(
        (Stack("layers", (_MODERNBERT_ATTENTION, _MODERNBERT_FFN), pre_norm=True),)
    ),
    "gpt2": Architecture((Stack("h", (_GPT2_ATTENTION, _GPT2_FFN), pre_norm=True),), causal=True),
    "opt": Architecture(
        (Stack("decoder.layers", (_OPT_ATTENTION, _OPT_FFN), pre_norm=True),),
        causal=True,
        needed={"do_layer_norm_before": True},
    ),
    "bart": _BART,
    "marian": _BART,
    "pegasus": _PEGASUS,
    "mbart": _PEGASUS,
    "m2m_100": _PEGASUS,
    "t5": _T5,
    "mt5": _T5,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "smollm3": _LLAMA,
    "gemma": _LLAMA,
    "starcoder2": Architecture(
        (Stack("layers", (_LLAMA_ATTENTION, _GPT2_FFN), pre_norm=True),), causal=True
    ),
    "stablelm": replace(_LLAMA, needed={"use_parallel_residual": False, "qk_layernorm": False}),
    "vit": _VIT,
    "deit": _VIT,
    "beit": Architecture((Stack("layers", _BEIT_SUBLAYERS, pre_norm=True),)),
    "dinov2": _DINOV2,
    "dinov2_with_registers": _DINOV2,
}

REFUSED: dict[str, str] = {
    "mobilebert": (
        "it carries two hidden states, one of 512 features and one of 128 inside of a "
        "bottleneck, and cannot be fitted one sublayer at a time as all methods here do"
    ),
    "deberta": (
        "its attention keeps queries, keys and values of a head side by side in one projection, "
        "and their biases apart from it"
    ),
}
"""Families that were looked at and have no row, and why."""
