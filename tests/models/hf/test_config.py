"""Nothing in a config.json is overlooked."""

from pathlib import Path

import pytest

from qst_tune.errors import UserError
from qst_tune.models.hf.config import HFConfig


def config(**settings) -> HFConfig:
    return HFConfig(Path("folder"), settings)


def test_what_nobody_takes_is_refused_with_its_value() -> None:
    settings = config(a=1, b="x", c=None, use_cache=True, d=0)
    settings.take("d")
    with pytest.raises(UserError, match=r"^folder/config\.json: a=1, b='x' is not known and may"):
        settings.finish()


def test_what_is_taken_is_not_refused_whichever_way() -> None:
    settings = config(a=1, b=2.5, c=True, d="x", e=None)
    assert settings.whole("a") == 1
    assert settings.number("b", 1.0) == 2.5
    assert settings.flag("c", False) is True
    assert settings.choice("d", "x") == "x"
    assert settings.limit("e", 3.0) is None
    settings.finish()


def test_absent_and_null_take_the_default() -> None:
    settings = config(a=None)
    for name in ("a", "b"):
        assert settings.take(name, 3) == 3
        assert settings.whole(name, 3) == 3
        assert settings.number(name, 0.5) == 0.5
        assert settings.flag(name, True) is True


def test_null_is_no_limit_and_an_absent_one_is_the_default() -> None:
    settings = config(a=None, c=7)
    assert settings.limit("a", 3.0) is None
    assert settings.limit("b", 3.0) == 3.0
    assert settings.limit("b", None) is None
    assert settings.limit("c", None) == 7.0


def test_true_is_not_the_number_one() -> None:
    settings = config(a=True, b=1)
    with pytest.raises(UserError, match="a=True must be a whole number"):
        settings.whole("a")
    with pytest.raises(UserError, match="a=True must be a number"):
        settings.number("a", 1.0)
    with pytest.raises(UserError, match="b=1 is not supported, only True or False"):
        settings.flag("b", True)
