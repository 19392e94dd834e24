"""Prepares a side network's directory for a model hub: no local paths, a full model card."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

from qst_tune.atomic_files import write_directory
from qst_tune.backbone.identity import BackboneId
from qst_tune.config.file import PlainConfig
from qst_tune.config.model_directory import changed_texts
from qst_tune.config.record import without_secrets
from qst_tune.errors import UserError
from qst_tune.results.card import describe_lineage, paragraph, shown, table
from qst_tune.results.description import SIDE_NETWORK, Description, read_description
from qst_tune.results.peft_adapter import public_files
from qst_tune.results.recipe_config import read_recipe_config
from qst_tune.results.tuned_directory import (
    CARD_FILE,
    RECIPE_CONFIG,
    check_finite,
    read_tensors,
    transformers_config,
)

_PACKAGES = ("torch", "torchtune", "torchao", "transformers")


@dataclass(frozen=True)
class Publication:
    """What only the person who shares a side network knows."""

    name: str  # under which others will load it: a name on the hub, or a directory
    base_model: str  # the backbone's name on the hub
    # of the side network, in the hub's names; the backbone's own terms go with the backbone
    license: str | None = None
    data: str | None = None  # the training data, for people; default: the names of the files


def base_model_of(directory: Path) -> str:
    """Return the hub name of a side network's backbone; a local backbone is a UserError."""
    backbone = read_description(directory, SIDE_NETWORK).backbone
    if not backbone.revision:
        raise UserError(
            f"the run had {backbone.name} from a local directory: name the model on the hub "
            "with --base-model org/name"
        )
    return backbone.name


def make_hub_directory(directory: Path, target: Path, publication: Publication) -> list[str]:
    """Copy a side network with everything that others need to use it.

    Returns the settings that were left out since they look like secrets. An existing ``target``, a
    damaged side network and a classifier are a UserError.
    """
    if target.exists():
        raise UserError(f"{target} exists already: name a new directory")
    description = read_description(directory, SIDE_NETWORK)
    if description.is_classifier:
        raise UserError(f"{directory} is a classifier; only models that write text are shared")
    weights = directory / SIDE_NETWORK.weights_file
    check_finite(weights, read_tensors(directory, SIDE_NETWORK))
    config = read_recipe_config(directory)
    if not isinstance(config.get("checkpointer"), dict):
        raise UserError(f"{directory / RECIPE_CONFIG} cannot be read: it has no checkpointer block")
    config, secrets = without_secrets(config)
    block, others = without_secrets(description.model)
    public = _public_name(description.backbone, publication.base_model)
    config = _without_paths(config, str(config["checkpointer"].get("checkpoint_dir", "")), public)
    home = str(description.model.get("checkpoint_dir", ""))
    portable = replace(description, model=_without_paths(block, home, public))
    adapter = public_files(directory, public)
    usage = _peft_usage(publication) if adapter else ""
    card = model_card(portable, config, publication, summary=_summary(directory), peft=usage)
    files = {
        SIDE_NETWORK.weights_file: weights.read_bytes(),
        SIDE_NETWORK.config_file: portable.to_json(),
        RECIPE_CONFIG: yaml.safe_dump(config, sort_keys=False).encode(),
        "config.json": transformers_config(public),
        CARD_FILE: card.encode(),
        **adapter,
    }
    write_directory(target, files)
    return sorted({*secrets, *(f"model.{key}" for key in others)})


def _public_name(backbone: BackboneId, base_model: str) -> str:
    """The hub name, with the commit if the run had the model from the hub."""
    is_from_there = backbone.name == base_model and backbone.revision
    return f"{base_model}@{backbone.revision}" if is_from_there else base_model


def _without_paths(block: PlainConfig, home: str, public: str) -> PlainConfig:
    """Copy plain dicts, lists and values without local paths.

    ``home``, the backbone's directory here, becomes its ``public`` name; of other absolute paths
    the last part remains.
    """

    def portable(text: str) -> str:
        if home and (text == home or text.startswith(f"{home}/")):
            return public + text.removeprefix(home)
        # Below a directory of the environment, which the run's config leaves unresolved.
        is_variable = text.startswith("${") and "/" in text
        is_path = Path(text).is_absolute() or text.startswith("~") or is_variable
        return Path(text).name.rstrip("}") if is_path else text

    return dict(changed_texts(block, portable))


def _summary(directory: Path) -> PlainConfig:
    """What the run measured, if the directory is still where the run wrote it."""
    try:
        found = json.loads((directory.parent / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def model_card(
    description: Description,
    config: PlainConfig,
    publication: Publication,
    *,
    summary: PlainConfig,
    peft: str = "",
) -> str:
    """Write the card: what it is, how to use it, how it was made and the results.

    ``config`` has no local paths; ``summary`` may be empty, and so ``peft``, how PEFT loads it. The
    card is Markdown with the hub's front matter.
    """
    front = ModelCardData(
        base_model=publication.base_model,
        library_name="qst_tune",
        license=publication.license,
        pipeline_tag="text-generation",
        tags=["qst", "quantized-side-tuning", "torchtune"],
    )
    verdict = f"**Validation**: {description.verdict}.\n\n" if description.verdict else ""
    return f"""\
---
{front.to_yaml()}
---
# {publication.name.rpartition("/")[2]}

{_about(description, publication)}

## Use

```python
import qst_tune.transformers
from transformers import pipeline

chat = pipeline(
    "text-generation",
    model="{publication.name}",
    model_kwargs={{"allow_download": True}},  # of {publication.base_model}
)
question = [{{"role": "user", "content": "What can you tell me?"}}]
print(chat(question, max_new_tokens=40)[0]["generated_text"][-1]["content"])
```

The package is not on an index yet: `pip install -c constraints.txt .` in a clone of qst_tune
installs it. With torchtune, in this directory:

```
tune run qst_chat --config auto/qst_chat side_network=. checkpoint_dir={publication.base_model}
```

A local directory of the backbone's name is used instead of the hub's if there is one.
`recipe_config.yaml` is the config of the run. A config is code: whatever it names is called, so do
not run one that you have not read; the command above takes nothing from it but texts and numbers.
{peft}
## Training

{table("", _training(config, publication))}

{table("result", {name: shown(value) for name, value in description.results.items()})}

{verdict}{describe_lineage(description.lineage)}{table("measured", dict(_measured(summary)))}

The whole config is `recipe_config.yaml`. Made with qst_tune {description.version}; this
card was written with {", ".join(f"{name} {version(name)}" for name in _PACKAGES)}.

## Limits

It has the knowledge, the biases and the terms of use of `{publication.base_model}`, and was tuned
on the data above and on nothing else. The figures are of the run; nothing more was measured.
"""


def _about(description: Description, publication: Publication) -> str:
    """What it is and which backbone it needs."""
    lora = description.structure.lora if description.structure else ""
    linked = lora.replace("LoRA", "[LoRA](https://arxiv.org/abs/2106.09685)")
    what, use = linked, "works"
    if description.has_side_network:
        what = "A side network of [QST](https://arxiv.org/abs/2401.07159)"
        what += f", with {linked}," if lora else ""
        use = "cannot be merged into that model, and works"
    return paragraph(
        f"{what} for `{publication.base_model}`, which runs in "
        f"{description.backbone.quantization} and is not part of this directory. It {use} with no "
        "other weights than those of the fingerprint "
        f"`{description.backbone.fingerprint[:16]}...`: loading checks it."
    )


def _peft_usage(publication: Publication) -> str:
    return f"""
`peft/` has the same LoRA for other programs. PEFT loads it over the model's weights in any format:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{publication.base_model}")
model = PeftModel.from_pretrained(base, "{publication.name}", subfolder="peft")
```
"""


def _training(config: PlainConfig, publication: Publication) -> dict[str, object]:
    optimizer = config.get("optimizer") or {}
    plain = ("epochs", "batch_size", "gradient_accumulation_steps", "seed", "dtype")
    found = {
        "data": publication.data or ", ".join(_data_files(config.get("dataset"))),
        **{f"model.{name}": value for name, value in config["model"].items()},
        **{name: config.get(name) for name in plain},
        "optimizer": optimizer.get("_component_"),
        "lr": optimizer.get("lr"),
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def _data_files(block: Any) -> Iterator[str]:
    for part in block if isinstance(block, list) else [block or {}]:
        name = part.get("data_files") or part.get("source")
        if name:
            yield str(name)


def _measured(summary: PlainConfig) -> Iterator[tuple[str, str]]:
    """The run's single figures; curves are in its own summary."""
    memory = summary.get("memory_gib") or {}
    figures = {
        **{n: summary.get(n) for n in ("trainable_parameters", "tokens_per_second", "seconds")},
        **{f"memory, GiB: {name}": value for name, value in memory.items()},
    }
    for name, value in figures.items():
        if isinstance(value, int | float):
            yield name.replace("_", " "), shown(value)
