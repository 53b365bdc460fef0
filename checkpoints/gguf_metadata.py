"""A GGUF file's metadata as the attributes of transformers' configuration.

No key that changes what is computed is dropped: each one is honoured, or it is known to change nothing, or the file
is refused by the key's name. The same holds for the tensors that scale the rotary embeddings. It reads no weights.

Sources: llama.cpp's `load_hparams` and `load_arch_hparams` for each architecture, for what a key means and its
default; its convert_hf_to_gguf.py, for what is written.
"""

from collections.abc import Mapping

from checkpoints import gguf_ends
from checkpoints.gguf_architectures import ARCHITECTURES, Architecture
from checkpoints.gguf_header import Header, Value
from checkpoints.gguf_keys import Attributes, Keys
from checkpoints.gguf_rope import Factors

MINIMA = {"attention.sliding_window": 0, "feed_forward_length": 0}  # of counts; 1 of others
NO_EFFECT = {  # keys that do not change what is computed, or whose value is known from elsewhere
    "vocab_size",  # the number of rows of the embedding
    "attention.value_length",  # in the tensors' shapes, which are checked
    "rope.scaling.finetuned",
    "tensor_data_layout",
    "expert_feed_forward_length",  # in the shapes
    "expert_shared_feed_forward_length",  # in the shapes
}
NEUTRAL: Mapping[str, tuple[Value, ...]] = {  # keys that change nothing at these values, and are refused at others
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0.0,),
    "attention.clamp_kqv": (0.0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "expert_group_count": (0, 1),
    "expert_group_used_count": (0, 1),
    "expert_weights_scale": (0.0, 1.0),
    "expert_weights_norm": (False,),
    "expert_gating_func": (0, 1),  # not given; softmax
    "leading_dense_block_count": (0,),
    "interleave_moe_layer_step": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_attn_factor": (1.0,),
}
NOT_MODELS = {  # general.type of files that are no models -> what they are, and what to do
    "adapter": "it is a LoRA adapter, which is not served; merge it into its model",
    "mmproj": "it holds the image or audio part of a model; name the file of its text model",
    "imatrix": "it is an importance matrix, which is for quantizing; name the file of its model",
    "vocab": "it is a vocabulary without a model",
}
TYPE_PREFIXES = {"adapter.": "adapter", "clip.": "mmproj", "imatrix.": "imatrix"}  # keys older than general.type
UNSUPPORTED_PREFIXES = ("diffusion.", "xielu.")  # keys without an architecture's name that change what is computed
SAMPLING = {  # what a model's authors recommend -> transformers' names; other samplers are not offered here
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def check_kind(header: Header) -> None:
    """Raises ValueError with a sentence for a file that is no text model, or not for this machine."""
    types = (kind for key in header.values for prefix, kind in TYPE_PREFIXES.items() if key.startswith(prefix))
    kind = next(types, header.values.get("general.type"))
    if kind not in (None, "model"):
        raise ValueError(NOT_MODELS.get(str(kind), f"its key general.type is {kind}; only models are served"))
    if header.is_big_endian:
        raise ValueError("it is big-endian; convert it with gguf-convert-endian")
    unsupported = [key for key in header.values if key.startswith(UNSUPPORTED_PREFIXES)]
    if unsupported:
        raise ValueError(f"its key {unsupported[0]} is not supported")


def attributes(header: Header, factors: Factors) -> Attributes:
    """Returns the configuration's attributes, with `model_type`.

    factors: the values of the tensors gguf_rope.FACTORS that the file has. Raises ValueError with a sentence that names
    the key.
    """
    keys = Keys(header)
    architecture = ARCHITECTURES.get(keys.architecture)
    if architecture is None:
        raise ValueError(
            f"its architecture is {keys.architecture or 'not given'}; the supported ones are {', '.join(ARCHITECTURES)}"
        )
    config: Attributes = {"model_type": architecture.model_type, **architecture.constants}
    for key, attribute in architecture.attributes.items():
        if key in keys or key not in architecture.optional:
            is_count = not key.endswith(("epsilon", "softcapping"))
            config[attribute] = keys.count(key, minimum=MINIMA.get(key, 1)) if is_count else keys.number(key)
    for derive in architecture.derive:
        config |= derive(keys, config, factors)
    _refuse_unread(keys, architecture)
    num_rows = keys.shape("token_embd.weight")[0]
    return {
        **config,
        "vocab_size": num_rows,
        "tie_word_embeddings": not keys.has("output.weight"),
        **_token_ids(header, num_rows),
    }


def _refuse_unread(keys: Keys, architecture: Architecture) -> None:
    """Raises ValueError for a key that was not read, unless its value changes nothing."""
    for key in keys:
        if key in keys.read or key in NO_EFFECT:
            continue
        neutral = architecture.neutral.get(key, NEUTRAL.get(key, ()))
        if key == "attention.sliding_window" and keys.number(key) >= keys.number("context_length"):
            continue  # the window holds the whole context
        if key == "embedding_length_out" and keys.number(key) in (0, keys.number("embedding_length")):
            continue  # as long as the vectors that go in
        if keys.value(key) not in neutral:
            raise keys.refuse(key, f"it must be {' or '.join(map(str, neutral))}" if neutral else "")


def sampling(header: Header) -> dict[str, Value]:
    """Returns the sampling parameters that the file recommends, by transformers' names."""
    return {name: header.values[key] for key, name in SAMPLING.items() if key in header.values}


def _token_ids(header: Header, num_rows: int) -> Attributes:
    """Returns the ids of special tokens; None where the file gives none, or one without a row in the embedding."""
    ids = {attribute: _valid_id(gguf_ends.named_id(header, name), num_rows) for attribute, name in TOKENS.items()}
    end_ids = [token for token in gguf_ends.ends(header) if _valid_id(token, num_rows) is not None]
    return {**ids, "eos_token_id": end_ids[0] if len(end_ids) == 1 else end_ids or None}


def _valid_id(token: int | None, num_rows: int) -> int | None:
    return token if token is not None and 0 <= token < num_rows else None
