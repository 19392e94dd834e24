"""What is read of a quantization_config, and what is refused, in one line."""

from pathlib import Path
from typing import Any

import pytest
import torch

from qst_tune.backbone.directory_methods import read_directory_format
from qst_tune.errors import UserError
from tests.support.stored_models import FORMATS

PATH = Path("config.json")


@pytest.mark.parametrize(
    ("form", "title", "own"),
    [
        ("bnb_nf4", "bitsandbytes nf4", "nf4"),
        ("bnb_fp4", "bitsandbytes fp4", "fp4"),
        ("bnb_int8", "bitsandbytes int8, per channel", "int8, per channel, bitsandbytes"),
        ("gptq", "GPTQ int4, groups of 32", "int4, groups of 32, gptq"),
        ("gptq_v2_channel", "GPTQ int4, per channel", "int4, per channel, gptq"),
        ("awq", "AWQ int4, groups of 32", "int4, groups of 32, awq"),
        ("ct_fp8", "compressed-tensors FP8", None),
        ("fp8", "FP8, blocks of 48 x 48", None),
    ],
)
def test_a_format_is_named_as_what_it_becomes(form: str, title: str, own: str | None) -> None:
    stored = read_directory_format(PATH, FORMATS[form][0])
    assert (stored.title, stored.own) == (title, own)
    linear: Any = stored.make(torch.empty(64, 64, device="meta"), None)
    assert linear.quantization == (own or "nf4")


def test_bitsandbytes_of_before_it_named_itself_is_known() -> None:
    old = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert read_directory_format(PATH, old).own == "nf4"


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        ("gptq", {"quant_method": "hqq"}, "quant_method='hqq' is not supported, only bitsandbytes"),
        (
            "gptq",
            {"checkpoint_format": "marlin"},
            "checkpoint_format=marlin is not supported, only",
        ),
        ("gptq", {"is_marlin_format": True}, "is_marlin_format is not supported"),
        ("gptq", {"bits": 5}, "bits=5 is not supported, only 2, 3, 4, 8"),
        ("gptq", {"bits": None}, " of gptq is damaged: TypeError"),
        ("awq", {"version": "gemv"}, "version=gemv is not supported, only gemm"),
        ("awq", {"bits": 3}, "bits=3 is not supported, only 4"),
        ("bnb_nf4", {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type=int4 is not supported"),
        ("ct_int4", {"transform_config": {"a": 1}}, "transform_config .rotated weights. is not"),
        ("ct_int4", {"config_groups": {}}, "config_groups of 0 formats in one model are not"),
        (
            "ct_int4",
            {"config_groups": {"a": {"weights": {"type": "float", "num_bits": 4}}}},
            "num_bits of a float=4 is not supported, only 8",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(form: str, changes, message: str) -> None:
    with pytest.raises(UserError, match=f"^config.json: quantization_config.*{message}"):
        read_directory_format(PATH, {**FORMATS[form][0], **changes})
