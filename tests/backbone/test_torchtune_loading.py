"""Weights arrive where they belong, quantised one by one, and a wrong checkpoint is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchao.dtypes.nf4tensor import NF4Tensor, to_nf4
from torchtune import training
from torchtune.models import convert_weights
from torchtune.models.llama2 import llama2
from torchtune.models.llama3_2 import llama3_2
from torchtune.training import FullModelHFCheckpointer

from qst_tune.backbone.torchtune_loading import check_architecture, load_backbone
from qst_tune.errors import UserError
from qst_tune.models import peqa_decoder, qst_decoder
from qst_tune.modules.peqa_linear import PEQALinear
from qst_tune.quantization.nf4 import quantize_nf4
from qst_tune.quantization.table import quantize_table
from tests.support.checkpoints import SIZES, hf_config, random_weights, write_checkpoint

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
A_WEIGHT = "model.layers.1.mlp.up_proj.weight"


def meta_model(dtype=torch.float32, **settings):
    with training.set_default_dtype(dtype), torch.device("meta"):
        return qst_decoder(llama3_2(**SIZES), reduction_factor=4, rank=4, **settings)


def checkpointer(directory: Path, files: list[str]) -> FullModelHFCheckpointer:
    return FullModelHFCheckpointer(
        checkpoint_dir=str(directory),
        checkpoint_files=files,
        model_type="LLAMA3_2",
        output_dir=str(directory.parent / "out"),
    )


def load(directory: Path, weights=None, *, num_shards=1, dtype=torch.float32, **settings):
    """Write a checkpoint and load it; returns the model and the fingerprint."""
    files = write_checkpoint(directory, weights, num_shards=num_shards)
    model = meta_model(dtype, **settings)
    fingerprint = load_backbone(model, checkpointer(directory, files), dtype=dtype, device=CPU)
    return model, fingerprint


def in_torchtune_names(weights):
    heads, kv_heads = SIZES["num_heads"], SIZES["num_kv_heads"]
    return convert_weights.hf_to_tune(
        weights, num_heads=heads, num_kv_heads=kv_heads, dim=SIZES["embed_dim"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_weight_is_the_files_or_its_nf4(dtype: torch.dtype, tmp_path: Path) -> None:
    weights = random_weights()
    model, _ = load(tmp_path / "model", weights, dtype=dtype)
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("side.")}
    expected = in_torchtune_names(weights)
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert not parameter.requires_grad
        if name.startswith("layers.") and parameter.ndim == 2:
            assert isinstance(parameter, NF4Tensor), name
            oracle = to_nf4(
                expected[name].to(dtype), parameter.block_size, parameter.scaler_block_size
            )
            actual, wanted = parameter.get_original_weight(), oracle.get_original_weight()
        else:
            is_norm = parameter.ndim == 1  # norms stay in fp32
            actual, wanted = parameter.data, expected[name].to(torch.float32 if is_norm else dtype)
        assert actual.dtype == wanted.dtype, name
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
@pytest.mark.parametrize("num_shards", [1, 3])
def test_integer_linears_are_rounded_from_the_files_own_precision(
    dtype: torch.dtype, num_shards: int, tmp_path: Path
) -> None:
    weights = random_weights()
    files = write_checkpoint(tmp_path / "model", weights, num_shards=num_shards)
    with training.set_default_dtype(dtype), torch.device("meta"):
        model = peqa_decoder(llama3_2(**SIZES), bits=3, group_size=32)
    fingerprint = load_backbone(
        model, checkpointer(tmp_path / "model", files), dtype=dtype, device=CPU
    )
    expected = in_torchtune_names(weights)
    for name, module in model.named_modules():
        if isinstance(module, PEQALinear):
            fresh = PEQALinear(expected.pop(f"{name}.weight"), bits=3, group_size=32)
            for part, value in fresh.state_dict().items():
                assert torch.equal(module.state_dict()[part], value), (name, part)
            assert module.weight_scale.requires_grad
    for name, weight in expected.items():
        wanted = weight.to(torch.float32 if weight.ndim == 1 else dtype)
        assert torch.equal(model.get_parameter(name), wanted), name
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
    # The checkpoint's, whatever is made of it.
    assert fingerprint == load(tmp_path / "again", weights)[1]


def test_an_integer_linear_of_another_shape_is_refused(tmp_path: Path) -> None:
    weights = random_weights()
    weights[A_WEIGHT] = weights[A_WEIGHT][:-1]
    files = write_checkpoint(tmp_path / "model", weights)
    with torch.device("meta"):
        model = peqa_decoder(llama3_2(**SIZES))
    with pytest.raises(UserError, match=r"w3.weight has shape \(95, 64\) .* and \(96, 64\) in"):
        load_backbone(
            model, checkpointer(tmp_path / "model", files), dtype=torch.float32, device=CPU
        )


def test_nothing_but_the_side_network_is_left_on_meta(tmp_path: Path) -> None:
    model, _ = load(tmp_path / "model")
    on_meta = {n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta}
    assert on_meta
    assert all(name.startswith("side.") for name in on_meta)


def test_rotary_caches_are_those_of_a_model_built_on_the_device(tmp_path: Path) -> None:
    model, _ = load(tmp_path / "model")
    expected = llama3_2(**SIZES).layers[0].attn.pos_embeddings.cache
    torch.testing.assert_close(model.layers[2].attn.pos_embeddings.cache, expected, rtol=0, atol=0)


def test_backbone_can_stay_unquantised(tmp_path: Path) -> None:
    weights = random_weights()
    model, _ = load(tmp_path / "model", weights, quantize_base=False)
    expected = in_torchtune_names(weights)["layers.1.mlp.w3.weight"]
    torch.testing.assert_close(model.layers[1].mlp.w3.weight.data, expected, rtol=0, atol=0)


def test_weights_can_be_stored_as_fp4(tmp_path: Path) -> None:
    weights = random_weights()
    model, _ = load(tmp_path / "model", weights, base_quantization="fp4")
    weight = model.layers[1].mlp.w3.weight
    dense = in_torchtune_names(weights)["layers.1.mlp.w3.weight"]
    expected = quantize_nf4(dense, "fp4").get_original_weight()
    torch.testing.assert_close(weight.get_original_weight(), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.bfloat16]
)
def test_embedding_and_head_are_rounded_as_their_shards_come(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """From the file's own precision."""
    weights = random_weights()
    weights["lm_head.weight"] = torch.randn_like(weights["model.embed_tokens.weight"])
    files = write_checkpoint(tmp_path / "model", weights, num_shards=3)
    with training.set_default_dtype(dtype), torch.device("meta"):
        backbone = llama3_2(**SIZES, tie_word_embeddings=False)
        model = qst_decoder(backbone, reduction_factor=4, embedding_quantization="int8")
    fingerprint = load_backbone(
        model, checkpointer(tmp_path / "model", files), dtype=dtype, device=CPU
    )
    for name, source in (("tok_embeddings", "model.embed_tokens"), ("output", "lm_head")):
        expected = quantize_table(weights[f"{source}.weight"], dtype=dtype)
        actual = model.get_parameter(f"{name}.weight")
        assert torch.equal(actual.codes, expected.codes)
        assert torch.equal(actual.row_scale, expected.row_scale)
        assert (actual.dtype, actual.requires_grad) == (dtype, False)
    with torch.device("meta"):
        plain = qst_decoder(llama3_2(**SIZES, tie_word_embeddings=False), reduction_factor=4)
    reader = checkpointer(tmp_path / "model", files)
    assert fingerprint == load_backbone(plain, reader, dtype=dtype, device=CPU)


@pytest.mark.parametrize("num_shards", [2, 4])
def test_shards_give_the_same_model_and_fingerprint(num_shards: int, tmp_path: Path) -> None:
    model, fingerprint = load(tmp_path / "one")
    sharded, sharded_fingerprint = load(tmp_path / "many", num_shards=num_shards)
    assert sharded_fingerprint == fingerprint
    for name, parameter in sharded.named_parameters():
        if isinstance(parameter, NF4Tensor):
            other = model.get_parameter(name)
            assert torch.equal(parameter.quantized_data, other.quantized_data), name


def test_fingerprint_does_not_depend_on_the_dtype_of_the_run(tmp_path: Path) -> None:
    assert load(tmp_path / "a")[1] == load(tmp_path / "b", dtype=torch.bfloat16)[1]


def test_fingerprint_does_not_depend_on_the_dtype_of_the_file(tmp_path: Path) -> None:
    narrow = {name: weight.bfloat16() for name, weight in random_weights().items()}
    wide = {name: weight.float() for name, weight in narrow.items()}
    assert load(tmp_path / "a", narrow)[1] == load(tmp_path / "b", wide)[1]


@pytest.mark.parametrize("name", [A_WEIGHT, "model.embed_tokens.weight", "model.norm.weight"])
def test_fingerprint_shows_that_one_weight_differs(name: str, tmp_path: Path) -> None:
    other = random_weights()
    other[name] = other[name] * 1.01
    assert load(tmp_path / "a")[1] != load(tmp_path / "b", other)[1]


def test_fingerprint_shows_that_two_layers_are_swapped(tmp_path: Path) -> None:
    other = random_weights()
    second = A_WEIGHT.replace(".1.", ".2.")
    other[A_WEIGHT], other[second] = other[second], other[A_WEIGHT]
    assert load(tmp_path / "a")[1] != load(tmp_path / "b", other)[1]


def test_head_stored_beside_its_tied_embedding_is_left_out(tmp_path: Path) -> None:
    weights = random_weights()
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    assert load(tmp_path / "a", weights)[1] == load(tmp_path / "b")[1]


def test_model_does_not_hold_on_to_the_file(tmp_path: Path) -> None:
    """The weights are copies: views would keep the whole file mapped, or change with it."""
    model, _ = load(tmp_path / "model")
    before = model.tok_embeddings.weight.clone()
    zeros = {name: torch.zeros_like(weight) for name, weight in random_weights().items()}
    save_file(zeros, tmp_path / "model" / "model.safetensors")
    assert torch.equal(model.tok_embeddings.weight, before)


# Wrong checkpoints.


def test_missing_weights_are_counted_and_one_is_named(tmp_path: Path) -> None:
    weights = {n: w for n, w in random_weights().items() if "layers.2" not in n}
    with pytest.raises(UserError, match=r"lacks 9 of the model's 29 weights.* layers\.2\."):
        load(tmp_path / "model", weights)


def test_layer_too_many_is_refused(tmp_path: Path) -> None:
    weights = random_weights()
    extra = {n.replace(".2.", ".3."): w.clone() for n, w in weights.items() if ".layers.2." in n}
    with pytest.raises(UserError, match=r"has a weight that the model lacks: layers\.3\."):
        load(tmp_path / "model", weights | extra)


def test_integers_and_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    weights = random_weights()
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.int32)
    with pytest.raises(UserError, match=r"weight norm\.scale is torch\.int32, where floating"):
        load(tmp_path / "integers", weights)
    weights = random_weights()
    weights["model.layers.1.mlp.up_proj.weight"].view(-1)[7] = torch.nan
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.w3\.weight has 1 of .* not finite"):
        load(tmp_path / "nan", weights)


def test_one_bit_of_one_value_is_another_fingerprint(tmp_path: Path) -> None:
    other = random_weights()
    other[A_WEIGHT].view(torch.int32).view(-1)[1234] ^= 1
    assert load(tmp_path / "a")[1].full != load(tmp_path / "b", other)[1].full


def test_wrong_shape_names_both_shapes(tmp_path: Path) -> None:
    weights = random_weights()
    weights["model.norm.weight"] = torch.ones(32)
    with pytest.raises(UserError, match=r"norm\.scale has shape \(32,\) .* and \(64,\) in the mod"):
        load(tmp_path / "model", weights)


@pytest.mark.parametrize("size", [0, 7, 1000, 50_000])
def test_truncated_file_is_named(size: int, tmp_path: Path) -> None:
    (name,) = write_checkpoint(tmp_path / "model")
    path = tmp_path / "model" / name
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        load_backbone(
            meta_model(), checkpointer(tmp_path / "model", [name]), dtype=torch.float32, device=CPU
        )


# Memory.

# 8 files of 43 MiB in bf16, and about a quarter of that as NF4.
MEASURE = """if True:
    import json, sys, threading, time
    from pathlib import Path
    import torch
    from qst_tune.models import qst_decoder
    from qst_tune.backbone.torchtune_loading import load_backbone
    from qst_tune.modules.memory import parameter_bytes
    from tests.support.checkpoints import write_checkpoint
    from torchtune.models.llama3_2 import llama3_2
    from torchtune.training import FullModelHFCheckpointer, set_default_dtype

    def anonymous_bytes():
        fields = dict(line.split(":") for line in open("/proc/self/status"))
        return int(fields["RssAnon"].split()[0]) * 1024

    sizes, directory, files = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    torch.set_num_threads(1)
    checkpointer = FullModelHFCheckpointer(
        checkpoint_dir=directory, checkpoint_files=files, model_type="LLAMA3_2",
        output_dir=directory + "_out")
    with set_default_dtype(torch.bfloat16), torch.device("meta"):
        model = qst_decoder(llama3_2(**sizes), reduction_factor=16)
    # What is built once whatever the checkpoint's size: torch's and our lookup tables.
    from qst_tune.quantization.nf4 import quantize_nf4
    quantize_nf4(torch.ones(64, 64, dtype=torch.bfloat16))
    before, peak, running = anonymous_bytes(), 0, True

    def watch():
        global peak
        while running:
            peak = max(peak, anonymous_bytes())
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    load_backbone(model, checkpointer, dtype=torch.bfloat16, device=torch.device("cpu"))
    running = False
    thread.join()
    model.side = None
    print(json.dumps({"peak": peak - before, "model": parameter_bytes(model)}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_peak_memory_is_the_quantised_model_and_one_shard(tmp_path: Path) -> None:
    sizes = {**SIZES, "num_layers": 16, "embed_dim": 1024, "intermediate_dim": 2048}
    sizes |= {"num_heads": 16, "num_kv_heads": 16}
    directory = tmp_path / "model"
    files = write_big_checkpoint(directory, sizes, num_shards=8)
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(sizes), str(directory), json.dumps(files)],
        cwd=ROOT,
        # What is freed goes back at once: how much of it glibc keeps depends on the machine's load.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    measured = json.loads(result.stdout.splitlines()[-1])
    shard = max((directory / name).stat().st_size for name in files)
    whole = sum((directory / name).stat().st_size for name in files)
    mib = 1024**2
    print(  # noqa: T201
        f"peak {measured['peak'] / mib:.0f} MiB; quantised model {measured['model'] / mib:.0f}, "
        f"one shard {shard / mib:.0f}, whole checkpoint {whole / mib:.0f}"
    )
    bound = 1.2 * (measured["model"] + shard)
    assert measured["peak"] <= bound
    assert bound < whole / 2, "the sizes of this test are too small to show anything"


def write_big_checkpoint(directory: Path, sizes, num_shards: int) -> list[str]:
    """As ``random_weights``, but one random layer serves for all: drawing them takes long."""
    weights = random_weights({**sizes, "num_layers": 1})
    for name, weight in list(weights.items()):
        weights[name] = weight.bfloat16()
        for index in range(1, sizes["num_layers"]) if ".layers.0." in name else ():
            weights[name.replace(".0.", f".{index}.")] = weights[name].clone()
    return write_checkpoint(directory, weights, sizes=sizes, num_shards=num_shards)


def write(directory: Path, **changes) -> Path:
    (directory / "config.json").write_text(json.dumps(hf_config(**changes)))
    return directory


def model(**changes):
    with torch.device("meta"):
        return llama3_2(**{**SIZES, **changes})


def test_the_checkpoints_own_model_passes(tmp_path: Path) -> None:
    check_architecture(model(), write(tmp_path))


def test_directory_without_a_config_passes(tmp_path: Path) -> None:
    check_architecture(model(), tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 100}, "vocab_size is 320 in the checkpoint and 100 in the model"),
        ({"num_layers": 1}, "num_layers is 3 in the checkpoint and 1 in the model"),
        ({"embed_dim": 32}, "embed_dim is 64 in the checkpoint and 32 in the model"),
        ({"num_heads": 8}, "num_heads is 4 in the checkpoint and 8 in the model"),
        ({"num_kv_heads": 4}, "num_kv_heads is 2 in the checkpoint and 4 in the model"),
        ({"intermediate_dim": 64}, "intermediate_dim is 96 in the checkpoint and 64 in the mod"),
        ({"rope_base": 20_000}, r"rope_base is 10000\.0 in the checkpoint and 20000\.0 in the"),
        ({"scale_factor": 32}, r"rope scale_factor is 1\.0 in the checkpoint and 32\.0 in the"),
    ],
)
def test_each_difference_is_named_with_both_values(changes, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"model block does not fit {tmp_path}: .*{message}"):
        check_architecture(model(**changes), write(tmp_path))


def test_all_differences_are_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_layers is .*; rope_base is "):
        check_architecture(model(num_layers=1, rope_base=1), write(tmp_path))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 500.0},
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        {"rope_theta": 500.0, "rope_scaling": {"type": "default"}},
    ],
)
def test_rotary_base_is_found_where_either_transformers_writes_it(rope, tmp_path: Path) -> None:
    check_architecture(model(rope_base=500), write(tmp_path, **rope))
    with pytest.raises(UserError, match=r"rope_base is 500\.0"):
        check_architecture(model(), write(tmp_path, **rope))


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_rotary_embedding_is_found_under_both_names(key: str, tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "factor": 32.0, "rope_theta": 10_000.0}
    check_architecture(model(scale_factor=32), write(tmp_path, **{key: rope}))
    with pytest.raises(UserError, match=r"rope scale_factor is 32\.0"):
        check_architecture(model(), write(tmp_path, **{key: rope}))


def test_plain_rotary_embedding_of_llama2_is_known(tmp_path: Path) -> None:
    sizes = {k: v for k, v in SIZES.items() if k != "scale_factor"}
    with torch.device("meta"):
        check_architecture(llama2(**sizes), write(tmp_path))


def test_config_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        check_architecture(model(), tmp_path)
