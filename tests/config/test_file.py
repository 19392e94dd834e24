"""Configs: torchtune's rules for overrides, texts that arrive as typed, and lines of keys."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from qst_tune.config.file import lines_of, parse_config, variables_in
from qst_tune.errors import UserError

YAML = """
prompt: ""
directory: /data
path: ${directory}/train.jsonl
rate: 0.1
model:
  _component_: torch.nn.Linear
  in_features: 2
  out_features: 3
dataset_val:
  _component_: torch.nn.ReLU
nested: {text: abc, number: 1}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return path


def parse(file: Path, *overrides: str):
    return parse_config(["--config", str(file), *overrides])


def test_without_overrides_it_is_the_file(file: Path) -> None:
    assert parse(file) == OmegaConf.create(YAML)


@pytest.mark.parametrize(
    "text",
    [
        "a=b",
        "what is x = y == z?",
        "list: [1, 2]",
        "[1, 2",
        "{a: b}",
        "key: value",
        "# no comment",
        "true",
        "1e-3",
        "007",
        "'single' and \"double\"",
        "back\\slash\\n",
        "~tilde",
        "- dash",
        "ümläut 日本 🙂",
        "two\nlines",
        "  spaces  ",
        "*star &and !bang %percent @at",
        "a, b",
    ],
)
@pytest.mark.parametrize("key", ["prompt", "nested.text"])
def test_text_arrives_as_typed(text: str, key: str, file: Path) -> None:
    assert OmegaConf.select(parse(file, f"{key}={text}"), key) == text


def test_values_that_are_no_text_in_the_file_keep_their_type(file: Path) -> None:
    cfg = parse(file, "rate=1e-3", "nested.number=7", "new=[1, 2]", "flag=True")
    assert (cfg.rate, cfg.nested.number, cfg.new, cfg.flag) == (1e-3, 7, [1, 2], True)


@pytest.mark.parametrize("null", ["null", "None", ""])
def test_null_takes_a_text_away(null: str, file: Path) -> None:
    assert not parse(file, f"directory={null}").directory


def test_interpolation_follows_overrides(file: Path) -> None:
    assert parse(file, "directory=/elsewhere").path == "/elsewhere/train.jsonl"
    assert parse(file, "path=${directory}/x").path == "/data/x"


def test_component_is_changed_by_the_name_of_its_block(file: Path) -> None:
    cfg = parse(file, "model=torch.nn.Bilinear")
    assert cfg.model == {"_component_": "torch.nn.Bilinear", "in_features": 2, "out_features": 3}


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("~/a b", "/h/a b"),
        ("~/x=1,[2]?", "/h/x=1,[2]?"),
        ("a~b", "a~b"),
        ("/a/", "/a/"),
    ],
)
def test_a_path_may_begin_with_the_home_directory(
    written: str, read: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the file and behind "=", in blocks, lists and what other values refer to."""
    monkeypatch.setenv("HOME", "/h")
    file.write_text(f"{YAML}\nin_file: {{data_files: ['{written}', b]}}\n")
    cfg = parse(file, f"directory={written}", f"nested.cache_dir={written}")
    assert cfg.in_file.data_files == [read, "b"]
    assert (cfg.directory, cfg.path, cfg.nested.cache_dir) == (read, f"{read}/train.jsonl", read)


def test_a_prompt_is_no_path(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/h")
    cfg = parse(file, "prompt=~/x?", "new.prompts=['~']", "new.system_prompt=~/y")
    assert (cfg.prompt, cfg.new.prompts[0], cfg.new.system_prompt) == ("~/x?", "~", "~/y")


def test_key_is_removed(file: Path) -> None:
    cfg = parse(file, "~nested.text", "~rate")
    assert cfg.nested == {"number": 1}
    assert "rate" not in cfg


def test_block_is_switched_off_by_null(file: Path) -> None:
    assert parse(file, "dataset_val=null").dataset_val is None
    assert parse(file, "dataset_val=None").dataset_val is None


@pytest.mark.parametrize("override", ["foo", "", "+a=b", "++a=b", "--x", "-x=1"])
def test_what_is_no_override_is_named(override: str, file: Path) -> None:
    with pytest.raises(UserError, match=r"override '.*' is not of the form key=value or ~key"):
        parse(file, override)


def test_what_is_not_yaml_is_named(file: Path) -> None:
    with pytest.raises(UserError, match=r"^overrides rate=\{: "):
        parse(file, "rate={")


def test_config_of_integer_keys_is_no_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("1: 2\n")
    with pytest.raises(UserError, match="not a mapping of names to values"):
        parse(tmp_path / "c.yaml")


def test_a_variable_that_overrides_leave_without_use_is_gone_and_a_key_of_recipes_stays(
    tmp_path: Path,
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "cache: /x\noutput_dir: ${cache}/runs\nlogs: ${output_dir}/logs\nmine: never referred to\n"
    )
    assert set(parse(file)) == {"cache", "output_dir", "logs", "mine"}
    assert set(parse(file, "output_dir=/y", "logs=/z")) == {"output_dir", "logs", "mine"}


DATASET = """
dataset:
  _component_: qst_tune.data.auto_dataset
  data_files: null
  source: hub/rows
"""


def test_template_arrives_as_typed_where_the_file_has_null(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("tokenizer: {_component_: a.b, chat_template: null}")
    template = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{% endfor %}"
    cfg = parse(tmp_path / "c.yaml", f"tokenizer.chat_template={template}")
    assert cfg.tokenizer.chat_template == template


@pytest.mark.parametrize(
    "path", ["*.jsonl", "[v2].x.jsonl", "a: b.jsonl", "?.jsonl", "{a}.jsonl", "#1.jsonl", "7"]
)
def test_path_of_data_files_arrives_as_typed(path: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(DATASET)
    assert parse(tmp_path / "c.yaml", f"dataset.data_files={path}").dataset.data_files == path


def test_data_files_may_be_a_list_or_null(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(DATASET)
    cfg = parse(tmp_path / "c.yaml", "dataset.data_files=[a.jsonl,b.jsonl]")
    assert cfg.dataset.data_files == ["a.jsonl", "b.jsonl"]
    assert parse(tmp_path / "c.yaml", "dataset.data_files=null").dataset.data_files is None


def test_another_dataset_has_its_own_source(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(DATASET)
    samsum = "torchtune.datasets.samsum_dataset"
    for override in (f"dataset={samsum}", f"dataset._component_={samsum}"):
        assert "source" not in parse(tmp_path / "c.yaml", override).dataset
        given = parse(tmp_path / "c.yaml", override, "dataset.source=json").dataset
        assert given.source == "json"
    assert parse(tmp_path / "c.yaml", "dataset.split=x").dataset.source == "hub/rows"


def test_every_key_has_its_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("# a comment\nmodel:\n  rank: 4  # yes\n\ndataset:\n  - a: 1\n    b: [2, 3]\n")
    assert lines_of(path) == {
        "model": 2,
        "model.rank": 3,
        "dataset": 5,
        "dataset[0]": 6,
        "dataset[0].a": 6,
        "dataset[0].b": 7,
        "dataset[0].b[0]": 7,
        "dataset[0].b[1]": 7,
    }


@pytest.mark.parametrize("text", ["", "3", "a: [", "\x00"])
def test_what_is_no_mapping_has_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    assert lines_of(tmp_path / "c.yaml") == {}
    assert lines_of(tmp_path / "absent.yaml") == {}


def test_every_key_that_a_value_refers_to_is_found_at_any_depth():
    cfg = OmegaConf.create(
        {
            "cache": "/x",
            "unused": 1,
            "output_dir": "${cache}/runs",
            "block": {"list": [{"path": "${output_dir}/a/${block.name}"}], "name": "b"},
        }
    )
    assert variables_in(cfg) == {"cache", "output_dir", "block"}


def test_an_environment_variable_is_no_key():
    assert variables_in(OmegaConf.create({"home": "${oc.env:HOME}"})) == {"oc"}
