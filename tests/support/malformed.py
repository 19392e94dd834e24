"""Two hundred and more malformed configs, data files, directories and requests, made from tables.

Each must end with status 2 and one line a mistake, or with 0 where the input is allowed after all;
never in a traceback, with a file left behind, or after more than a minute.
"""

import itertools
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qst_tune.config.schema import TRAINING_KEYS
from tests.support.attacks import Attack, Change, edit_json, edit_tensors, put, write

DRY = "tune run qst_finetune --config config.yaml output_dir={root}/new dry_run=True"
SHORT = "tune run qst_finetune --config config.yaml output_dir={root}/new dataset_val=null epochs=1"

# Configs: keys, each with some of these values.

VALUES = [
    "null",
    "''",
    "[]",
    "{}",
    ".nan",
    "-.inf",
    "-1",
    "0",
    "1e400",
    "99999999999999999999999",
    "true",
    "[1, [2, {a: b}]]",
    "{_component_: os.system}",
    "{_component_: 3}",
    "${nowhere}",
    "${oc.env:QST_TUNE_NOT_SET}",
    '"\\e[31mred"',
    '"\\0"',
    "a" * 5000,
    "../../../../etc/passwd",
    "/dev/null",
    "\u202egnirts",
]
NESTED = [
    *(f"model.{key}" for key in ("_component_", "num_layers", "embed_dim", "rope_base", "rank")),
    *(f"model.{key}" for key in ("reduction_factor", "variant", "num_side_blocks", "dropout")),
    *(f"model.{key}" for key in ("downsample", "initial_gamma", "base_quantization")),
    *(f"tokenizer.{key}" for key in ("_component_", "path", "max_seq_len", "chat_template")),
    *(f"checkpointer.{key}" for key in ("_component_", "checkpoint_dir", "checkpoint_files")),
    *("checkpointer.model_type", "optimizer.lr", "optimizer.weight_decay", "optimizer.betas"),
    *(f"dataset.{key}" for key in ("_component_", "source", "data_files", "split", "packed")),
    *("loss._component_", "metric_logger._component_", "metric_logger.log_dir"),
]
# Ten levels of nine aliases: a thousand million values.
MANY = [
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in itertools.pairwise("abcdefghij")
]
TEXTS: dict[str, str | bytes] = {
    "null key": "~: 4\n",
    "list key": "? [1, 2]\n: 3\n",
    "number key": "3: 4\n",
    "empty key": '"": 4\n',
    "dotted key": "model.rank: 4\n",
    "python object": "x: !!python/object/apply:os.system [touch CODE_RAN]\n",
    "alias of itself": "x: &a [*a]\n",
    "many aliases": "a: &a [x]\n" + "".join(MANY),
    "deep list": "x: " + "[" * 3000 + "]" * 3000 + "\n",
    "deep mapping": "x: " + "{a: " * 3000 + "1" + "}" * 3000 + "\n",
    "tab": "x:\n\t- 1\n",
    "two documents": "---\n{}\n---\n{}\n",
    "escape": 'x: "\\e]0;title\\a"\n',
    "circle": "output_dir: ${resume_from_checkpoint}\nresume_from_checkpoint: ${output_dir}\n",
    "unknown resolver": "output_dir: ${nope:1}\n",
    "half an interpolation": "output_dir: ${\n",
    "merge": "<<: 3\n",
    "NUL": b"x: a\0b\n",
    "not UTF-8": b"x: \xff\xfe\n",
    "UTF-16": "x: 1\n".encode("utf-16"),
    "set": "x: !!set {a, b}\n",
    "binary": "x: !!binary aGk=\n",
    "date": "output_dir: 2024-02-30\n",
}

ROW = '{"input": "what is it", "output": "it is red"}\n'
ROWS: dict[str, str | bytes] = {
    "nothing": "",
    "newlines": "\n\n\n",
    "NUL": ROW.encode() * 4 + b"\0" * 100,
    "not UTF-8": ROW.encode() * 4 + b'{"input": "\xff\xfe", "output": "x"}\n',
    "UTF-16": (ROW * 8).encode("utf-16"),
    "BOM": b"\xef\xbb\xbf" + ROW.encode() * 8,
    "cut": (ROW * 8)[:-20],
    "array": "[" + ",".join([ROW.strip()] * 8) + "]",
    "scalar": "3\n" * 8,
    "text": '"red"\n' * 8,
    "null": "null\n" * 8,
    "lists": "[1]\n" * 8,
    "mixed": ROW * 4 + "[1]\n" + ROW * 4,
    "deep": '{"input": ' + "[" * 5000 + "]" * 5000 + ', "output": "x"}\n' + ROW * 4,
    "deeper than Python": '{"a":' * 100_000 + "\n",
    "surrogate": '{"input": "\\ud800", "output": "x"}\n' * 8,
    "NUL in text": '{"input": "a\\u0000b", "output": "x"}\n' * 8,
    "escape in text": '{"input": "\\u001b[31mred\\u0007", "output": ""}\n' * 8,
    "infinity": '{"input": Infinity, "output": NaN}\n' * 8,
    "huge number": '{"input": 1e999, "output": ' + "9" * 5000 + "}\n" + ROW * 4,
    "one key twice": '{"input": "a", "input": "b", "output": "c"}\n' * 8,
    "other keys": '{"question": "a", "answer": "b"}\n' * 8,
    "empty object": "{}\n" * 8,
    "empty texts": '{"input": "", "output": ""}\n' * 8,
    "numbers": '{"input": 1, "output": 2}\n' * 8,
    "objects": '{"input": {"a": 1}, "output": {"b": [2]}}\n' * 8,
    "type changes": ROW * 4 + '{"input": 3, "output": ["x"]}\n' * 4,
    "special tokens": '{"input": "<|im_end|><|im_start|>", "output": "<|endoftext|>"}\n' * 8,
    "spaces": '{"input": "' + " " * 3000 + '", "output": " "}\n' + ROW * 4,
    "one enormous row": json.dumps({"input": "x " * 200_000, "output": "y"}) + "\n" + ROW * 4,
    "right to left": '{"input": "\u202eabc", "output": "\u2066x"}\n' * 8,
    "CSV": "input,output\na,b\n",
    "gzip": b"\x1f\x8b\x08\x00" + b"\0" * 50,
    "zip": b"PK\x03\x04" + b"\0" * 50,
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n.",
    "parquet": b"PAR1" + b"\0" * 50 + b"PAR1",
    "arrow": b"ARROW1\0\0" + b"\0" * 50,
}

# Directories: the description, config.json and tokenizer of a tiny result and its backbone.

PATHS: list[tuple[str | int, ...]] = [
    ("method",),
    ("format_version",),
    ("backbone",),
    ("backbone", "name"),
    ("backbone", "fingerprint"),
    ("backbone", "quantization"),
    ("model",),
    ("model", "_component_"),
    ("model", "num_layers"),
    ("model", "max_seq_len"),
    ("model", "embed_dim"),
    ("model", "rank"),
    ("model", "lora_layers"),
    ("model", "lora_attn_modules"),
    ("structure",),
    ("structure", "lora_rank"),
    ("structure", "rank"),
    ("structure", "layers"),
    ("structure", "downsample"),
    ("structure", "num_heads"),
    ("structure", "dropout"),
    ("results",),
    ("results", "steps"),
]
WRONG: list[Any] = [
    None,
    [],
    {},
    "x",
    "\x1b[31mred\n\x07",
    -1,
    10**12,
    0.5,
    True,
    [[1]],
    {"_component_": "os.system", "command": "touch CODE_RAN"},
    float("nan"),
    "../../../etc/passwd",
    "os.system",
]
RAW: dict[str, str | bytes] = {
    "nothing": "",
    "null": "null",
    "list": "[1]",
    "cut": '{"model": {',
    "deep": '{"a":' * 20_000,
    "NUL": b"\0" * 300,
    "not UTF-8": b'{"a": "\xff"}',
    "number": "9" * 6000,
}
HEADERS: dict[str, bytes] = {
    "nothing": b"",
    "length of all": b"\xff" * 8,
    "length beyond the file": (10**6).to_bytes(8, "little") + b"{}",
    "header that is a list": (2).to_bytes(8, "little") + b"[]",
    "header that is no JSON": (4).to_bytes(8, "little") + b"{{{{",
    "unknown dtype": b"",
    "offsets that overlap": b"",
    "offsets beyond the file": b"",
    "shape that overflows": b"",
    "negative shape": b"",
}
_CHANGED = {
    "unknown dtype": {"dtype": "F7", "shape": [1], "data_offsets": [0, 4]},
    "offsets that overlap": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    "offsets beyond the file": {"dtype": "F32", "shape": [100], "data_offsets": [0, 400]},
    "shape that overflows": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]},
    "negative shape": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
}


def _file(name: str) -> bytes:
    if name not in _CHANGED:
        return HEADERS[name]
    header = json.dumps({"norm.scale": _CHANGED[name]}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * 4


SIDE = "run/side_network/side_network.safetensors"
DESCRIPTION = "run/side_network/qst_config.json"
VERIFY, INSPECT = "sharing verify run/side_network model", "sharing inspect run/side_network"

# Requests: questions, texts and prompts.

QUESTION = {"question": "which?", "choices": ["a", "b"], "answer": 1, "subject": "s"}
QUESTIONS: dict[str, Any] = {
    "answer that is text": {**QUESTION, "answer": "b?"},
    "answer out of range": {**QUESTION, "answer": 7},
    "negative answer": {**QUESTION, "answer": -1},
    "answer of null": {**QUESTION, "answer": None},
    "answer that is a list": {**QUESTION, "answer": [1]},
    "no choices": {**QUESTION, "choices": []},
    "choices of null": {**QUESTION, "choices": None},
    "choices that are a text": {**QUESTION, "choices": "ab"},
    "choices that are numbers": {**QUESTION, "choices": [1, 2]},
    "question of null": {**QUESTION, "question": None},
    "question that is an object": {**QUESTION, "question": {"a": 1}},
    "subject that is a number": {**QUESTION, "subject": 3},
    "no question": {"choices": ["a", "b"], "answer": 1},
    "no object": [1],
    "answer that is a truth value": {**QUESTION, "answer": True},
    "answer with a fraction": {**QUESTION, "answer": 0.5},
    "half a character": {**QUESTION, "question": "\ud800"},
    "long question": {**QUESTION, "question": "x " * 2000},
}
TOOLS = {
    "deep": "[" * 100_000,
    "nothing": "",
    "a number": "3",
    "no list": "{}",
    "list of null": "[null]",
    "without a name": "[{}]",
    "name of a number": '[{"type": "function", "function": {"name": 5}}]',
    "half a character": '[{"type": "function", "function": {"name": "\\ud800"}}]',
    "not a number": '[{"name": "f", "x": NaN}]',
    "one key twice": '[{"name": "f", "name": "g"}]',
}


def _keys() -> Iterator[Attack]:
    values = itertools.cycle(VALUES)
    for key in [*TRAINING_KEYS, *NESTED]:
        for value in itertools.islice(values, 2):
            if key in ("output_dir", "dry_run") and value in ("true", "null"):
                continue
            shown = f"{key}={value}"
            yield Attack(f"config: {shown[:60]!r}", f"{DRY} {shlex.quote(shown)}")
        next(values)


def _config_text(text: str | bytes) -> Change:
    data = text.encode() if isinstance(text, str) else text

    def change(root: Path) -> None:
        path = root / "config.yaml"
        path.write_bytes(path.read_bytes() + data)

    return change


def _descriptions() -> Iterator[Attack]:
    wrong = itertools.cycle(WRONG)
    for path in PATHS:
        for value in itertools.islice(wrong, 2):
            name = f"description: {'.'.join(map(str, path))}={str(value)[:30]!r}"
            edit = edit_json(DESCRIPTION, put(value, *path))
            yield Attack(name, VERIFY, change=edit)
            yield Attack(f"inspected {name}", INSPECT, change=edit)
        next(wrong)


def _directories() -> Iterator[Attack]:
    for (name, text), file in itertools.product(RAW.items(), (DESCRIPTION, "model/config.json")):
        yield Attack(f"{file}: {name}", VERIFY, change=write(file, text))
    for name, text in RAW.items():
        for file in ("tokenizer.json", "tokenizer_config.json"):
            yield Attack(f"{file}: {name}", DRY, change=write(f"model/{file}", text))
        yield Attack(f"config.json of run: {name}", DRY, change=write("model/config.json", text))
    for name in HEADERS:
        yield Attack(f"side network: {name}", VERIFY, change=write(SIDE, _file(name)))
        yield Attack(f"inspected: {name}", INSPECT, change=write(SIDE, _file(name)))
        change = write("model/model.safetensors", _file(name))
        yield Attack(f"backbone: {name}", SHORT, change=change)
    for kind, edit in {
        "nan": lambda w: w["norm.scale"].fill_(float("nan")),
        "other dtype": lambda w: {k: v.long() for k, v in w.items()},
        "half": lambda w: {k: v.half() for k, v in w.items()},
        "one missing": lambda w: w.pop("norm.scale"),
        "one too many": lambda w: w.update(extra=w["norm.scale"].clone()),
        "other shape": lambda w: w.update({"norm.scale": w["norm.scale"][:1]}),
        "empty": lambda w: {},
    }.items():
        yield Attack(f"side network: {kind}", VERIFY, change=edit_tensors(SIDE, edit))


def _requests() -> Iterator[Attack]:
    evaluate = "tune run qst_evaluate --config config.yaml"
    for name, question in QUESTIONS.items():
        rows = "".join(json.dumps(row) + "\n" for row in (QUESTION, question))
        yield Attack(
            f"question: {name}",
            f"{evaluate} questions={{root}}/q.jsonl",
            change=write("q.jsonl", rows),
        )
    for name in ("nothing", "NUL", "not UTF-8", "escape in text", "one enormous row"):
        yield Attack(
            f"text: {name}",
            f"{evaluate} text={{root}}/text.txt",
            change=write("text.txt", ROWS[name]),
        )
    generate = "tune run qst_generate --config gen.yaml side_network={root}/run/side_network"
    for prompt in ("prompt=''", "prompt=null", "prompt=[1]", "prompt=3", f"prompt={'x ' * 500}"):
        yield Attack(f"prompt: {prompt[:20]}", f"{generate} {shlex.quote(prompt)}")
    for setting in ("max_new_tokens=0", "max_new_tokens=-1", "temperature=-1", "temperature=.nan",
                    "top_k=0", "top_k=1e9", "top_p=2", "seed=-1"):  # fmt: skip
        yield Attack(f"generation: {setting}", f"{generate} max_new_tokens=2 {setting}")
    for name, text in TOOLS.items():
        yield Attack(
            f"tools: {name}",
            f"{generate} tools={{root}}/tools.json",
            change=write("tools.json", text),
        )


def malformed() -> list[Attack]:
    """All of them, in one order."""
    return [
        *_keys(),
        *(Attack(f"config: {n}", DRY, change=_config_text(t)) for n, t in TEXTS.items()),
        *(Attack(f"rows: {n}", SHORT, change=write("train.jsonl", t)) for n, t in ROWS.items()),
        *_descriptions(),
        *_directories(),
        *_requests(),
    ]
