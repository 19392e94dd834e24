"""What a config.json may not say: each refusal is one line that names the setting."""

import json
from pathlib import Path

import pytest

from qst_tune.errors import UserError
from qst_tune.models.hf.config import HARMLESS
from qst_tune.models.hf.families import FAMILIES, read_architecture
from tests import hf_models
from tests.hf_models import SIZES

# Beside the sizes, what every published folder of the type has.
BASE = {
    "llama": {"hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 10_000.0},
    "mistral": {"hidden_act": "silu", "rms_norm_eps": 1e-5, "sliding_window": 32},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False, "sliding_window": 131_072},
    "qwen3": {"hidden_act": "silu", "head_dim": 16},
    "phi3": {"hidden_act": "silu", "original_max_position_embeddings": 64},
    "gemma": {"hidden_act": "gelu", "hidden_activation": None, "head_dim": 16},
    "gemma2": {"hidden_act": "gelu_pytorch_tanh", "head_dim": 16, "query_pre_attn_scalar": 16},
    "opt": {"ffn_dim": 100, "activation_function": "relu", "word_embed_proj_dim": 48},
}
REFUSED = [
    ("llama", {"hidden_act": "relu2"}, "hidden_act='relu2' is not supported, only 'silu' or"),
    ("llama", {"rope_scaling": {"type": "ntk"}}, "rope_scaling of type 'ntk' is not supported"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling of type 'linear' needs factor"),
    ("llama", {"rope_scaling": 2}, "rope_scaling=2 must be an object"),
    (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "factor": "8"}},
        "rope_scaling: factor='8' must be numbers",
    ),
    (
        "llama",
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "mscale": 0.7}},
        "rope_scaling of type 'linear': mscale=0.7 is not known",
    ),
    ("llama", {"rope_interleaved": True}, "rope_interleaved=True is not supported, only False"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
    ("llama", {"head_dim": 15}, "15 of 15 channels of a head would turn, not pairs"),
    ("llama", {"attention_bias": "yes"}, "attention_bias='yes' is not supported, only True or"),
    ("llama", {"residual_multiplier": 0.2}, "residual_multiplier=0.2 is not known and may change"),
    ("llama", {"auto_map": {"AutoModel": "m.M"}}, "auto_map={.*} is not known and may change"),
    ("llama", {"hidden_size": None}, "hidden_size is missing"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers=0 must be a whole number above 0"),
    ("llama", {"vocab_size": "307"}, "vocab_size='307' must be a whole number above 0"),
    ("llama", {"rms_norm_eps": "1e-5"}, "rms_norm_eps='1e-5' must be a number above 0"),
    ("llama", {"is_encoder_decoder": True}, "is_encoder_decoder=True is not supported"),
    (
        "llama",
        {"architectures": ["LlamaForSequenceClassification"]},
        r"architectures=\['LlamaForSequenceClassification'\] is not supported, only LlamaForCausal",
    ),
    ("mistral", {"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\] is not kn"),
    ("mistral", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
    ("qwen2", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
    ("qwen2", {"use_mrope": True}, "use_mrope=True is not supported, only False"),
    ("qwen2", {"layer_types": ["linear_attention"]}, "layer_types: 'linear_attention' is not supp"),
    ("phi3", {"mlp_bias": True}, "mlp_bias=True is not supported, only False"),
    (
        "phi3",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "rope_scaling: short_factor has 1 numbers, not 6",
    ),
    ("gemma", {"hidden_activation": "gelu_new"}, "hidden_activation='gelu_new' is not supported"),
    ("gemma", {"attention_bias": True}, "attention_bias=True is not supported, only False"),
    ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
    (
        "gemma2",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling of type 'linear' is not supported for Gemma",
    ),
    ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation='gelu' is not supported"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True is not"),
    ("opt", {"activation_function": "gelu"}, "activation_function='gelu' is not supported, only"),
    ("opt", {"enable_bias": False}, "enable_bias=False is not supported, only True"),
    ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False is"),
    ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True is not supported"),
]


def write(folder: Path, model_type: str, **changes) -> Path:
    sizes = dict(SIZES)
    if model_type == "opt":
        del sizes["intermediate_size"], sizes["num_key_value_heads"]
    settings = {**sizes, "model_type": model_type, **BASE.get(model_type, {}), **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def test_every_family_has_cases() -> None:
    """Of refusals here, of logits and training in tests/hf_models.py."""
    assert set(BASE) == set(hf_models.FAMILIES) == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_every_published_folder_has_is_read(model_type: str, tmp_path: Path) -> None:
    model_class = FAMILIES[model_type].model_class
    common = {"architectures": [model_class], "torch_dtype": "bfloat16", "use_cache": True}
    architecture = read_architecture(write(tmp_path, model_type, **common))
    assert architecture.limits["max_position_embeddings"] == 64


@pytest.mark.parametrize(("model_type", "changes", "message"), REFUSED)
def test_what_is_not_supported_is_refused_by_name(
    model_type: str, changes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}/config\.json: {message}") as error:
        read_architecture(write(tmp_path, model_type, **changes))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral", "llama4_text", None])
def test_another_architecture_is_refused_with_the_known_ones(model_type, tmp_path: Path) -> None:
    known = "llama, mistral, qwen2, qwen3, phi3, gemma, gemma2, opt"
    message = f"model_type={model_type!r} is not supported, only {known}"
    with pytest.raises(UserError, match=message):
        read_architecture(write(tmp_path, model_type))


def test_a_model_of_images_is_named_as_one(tmp_path: Path) -> None:
    changes = {"vision_config": {"hidden_size": 8}, "text_config": {"hidden_size": 8}}
    with pytest.raises(UserError, match="vision_config: model_type='mllama' is of more than text"):
        read_architecture(write(tmp_path, "mllama", **changes))


def test_settings_that_are_null_are_off(tmp_path: Path) -> None:
    read_architecture(write(tmp_path, "llama", quantization_config=None, residual_multiplier=None))


def test_no_family_reads_what_is_listed_as_harmless() -> None:
    """The list would hide that a family needs it."""
    source = Path(read_architecture.__code__.co_filename)
    read = source.read_text() + source.with_name("rope.py").read_text()
    assert [name for name in HARMLESS if f'"{name}"' in read] == []


@pytest.mark.parametrize(
    ("model_type", "changes", "limits"),
    [
        ("mistral", {"sliding_window": None}, {"max_position_embeddings": 64}),
        # transformers' default, which is what an absent key means
        ("gemma2", {}, {"max_position_embeddings": 64, "sliding_window": 4096}),
        ("gemma2", {"layer_types": ["full_attention"]}, {"max_position_embeddings": 64}),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 16},
            {"max_position_embeddings": 64, "sliding_window": 16},
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "layer_types": ["full_attention"]},
            {"max_position_embeddings": 64},
        ),
    ],
)
def test_sliding_windows_bound_the_length(model_type, changes, limits, tmp_path: Path) -> None:
    assert read_architecture(write(tmp_path, model_type, **changes)).limits == limits
