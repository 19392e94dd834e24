"""Prepares a side network's directory for a model hub: no local paths, a full model card."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from qst_tune.atomic_files import write_directory
from qst_tune.config.hub_models import changed_texts
from qst_tune.errors import UserError
from qst_tune.results.lineage import describe_lineage
from qst_tune.results.side_network import SIDE_NETWORK, transformers_config
from qst_tune.results.tuned_directory import read_description, read_tensors, shown, table

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
    backbone = read_description(directory, SIDE_NETWORK)["backbone"]
    if not backbone.get("revision"):
        raise UserError(
            f"the run had {backbone['name']} from a local directory: name the model on the hub "
            "with --base-model org/name"
        )
    return str(backbone["name"])


def make_hub_directory(directory: Path, target: Path, publication: Publication) -> None:
    """Copy a side network with everything that others need to use it.

    An existing ``target``, a damaged side network and a classifier are a UserError.
    """
    if target.exists():
        raise UserError(f"{target} exists already: name a new directory")
    description = read_description(directory, SIDE_NETWORK)
    public = _public_name(description["backbone"], publication.base_model)
    if "num_labels" in description["model"]:
        raise UserError(f"{directory} is a classifier; only models that write text are shared")
    read_tensors(directory, SIDE_NETWORK)  # raises if damaged
    cfg = _portable(directory / "recipe_config.yaml", public)
    home = str(description["model"].get("checkpoint_dir", ""))
    portable = _without_paths(description, home, public)
    card = model_card(description, cfg, publication, summary=_summary(directory))
    files = {
        SIDE_NETWORK.weights_file: (directory / SIDE_NETWORK.weights_file).read_bytes(),
        SIDE_NETWORK.config_file: (json.dumps(portable, indent=2) + "\n").encode(),
        "recipe_config.yaml": OmegaConf.to_yaml(cfg).encode(),
        "config.json": transformers_config(public),
        "README.md": card.encode(),
    }
    write_directory(target, files)


def _public_name(backbone: dict[str, Any], base_model: str) -> str:
    """The hub name, with the commit if the run had the model from the hub."""
    is_from_there = backbone["name"] == base_model and backbone.get("revision")
    return f"{base_model}@{backbone['revision']}" if is_from_there else base_model


def _portable(path: Path, public: str) -> DictConfig:
    """The run's config with names of files and directories instead of local paths."""
    try:
        cfg = OmegaConf.load(path)
    except Exception as error:  # OmegaConf and YAML raise many types
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read: {reason}") from error
    plain: Any = OmegaConf.to_container(cfg)
    home = str(plain["checkpointer"].get("checkpoint_dir", ""))
    portable: DictConfig = OmegaConf.create(_without_paths(plain, home, public))
    return portable


def _without_paths(node: Any, home: str, public: str) -> Any:
    """Copy plain dicts, lists and values without local paths.

    ``home``, the backbone's directory here, becomes its ``public`` name; of other absolute paths
    the last part remains.
    """

    def portable(text: str) -> str:
        if home and (text == home or text.startswith(f"{home}/")):
            return public + text.removeprefix(home)
        is_path = Path(text).is_absolute() or text.startswith("~")
        return Path(text).name if is_path else text

    return changed_texts(node, portable)


def _summary(directory: Path) -> dict[str, Any]:
    """What the run measured, if the directory is still where the run wrote it."""
    path = directory.parent / "summary.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found


def model_card(
    description: dict[str, Any],
    cfg: DictConfig,
    publication: Publication,
    *,
    summary: dict[str, Any],
) -> str:
    """Write the card: what it is, how to use it, how it was made and the results.

    ``cfg`` has no local paths; ``summary`` may be empty. The card is Markdown with the hub's front
    matter.
    """
    backbone = description["backbone"]
    return f"""\
{_front_matter(publication)}
# {publication.name.rpartition("/")[2]}

A side network of [QST](https://arxiv.org/abs/2401.07159) for `{publication.base_model}`, which
runs in {backbone["quantization"]} and is not part of this directory. It cannot be merged
into that model, and works with no other weights than those of the fingerprint
`{backbone["fingerprint"][:16]}...`: loading checks it.

## Use

```python
{_snippet(publication)}
```

The package is not on an index yet: `pip install -c constraints.txt .` in a clone of qst_tune
installs it. With torchtune, in this directory:

```
tune run qst_chat --config recipe_config.yaml side_network=.
```

`recipe_config.yaml` names the backbone by its hub name; a local directory of that name is used
instead if there is one.

## Training

{table("", _training(cfg, publication))}

{table("result", {name: shown(value) for name, value in description["results"].items()})}

{_verdict(description)}{describe_lineage(description.get("lineage") or ())}\
{table("measured", dict(_measured(summary)))}

The whole config is `recipe_config.yaml`. Made with qst_tune {description["qst_tune_version"]}; this
card was written with {", ".join(f"{name} {version(name)}" for name in _PACKAGES)}.

## Limits

It has the knowledge, the biases and the terms of use of `{publication.base_model}`, and was tuned
on the data above and on nothing else. The figures are of the run; nothing more was measured.
"""


def _verdict(description: dict[str, Any]) -> str:
    verdict = description.get("verdict")
    return f"**Validation**: {verdict}.\n\n" if verdict else ""


def _front_matter(publication: Publication) -> str:
    about = {
        "base_model": publication.base_model,
        "library_name": "qst_tune",
        "pipeline_tag": "text-generation",
        "tags": ["qst", "quantized-side-tuning", "torchtune"],
        **({"license": publication.license} if publication.license else {}),
    }
    return f"---\n{OmegaConf.to_yaml(OmegaConf.create(about))}---"


def _snippet(publication: Publication) -> str:
    return f"""\
import qst_tune.transformers
from transformers import pipeline

chat = pipeline("text-generation", model="{publication.name}")
question = [{{"role": "user", "content": "What can you tell me?"}}]
print(chat(question, max_new_tokens=40)[0]["generated_text"][-1]["content"])"""


def _training(cfg: DictConfig, publication: Publication) -> dict[str, Any]:
    model = {f"model.{name}": value for name, value in cfg.model.items()}
    optimizer = cfg.get("optimizer") or {}
    found = {
        "data": publication.data or ", ".join(_data_files(cfg.get("dataset"))),
        **model,
        "epochs": cfg.get("epochs"),
        "batch_size": cfg.get("batch_size"),
        "gradient_accumulation_steps": cfg.get("gradient_accumulation_steps"),
        "optimizer": optimizer.get("_component_"),
        "lr": optimizer.get("lr"),
        "seed": cfg.get("seed"),
        "dtype": cfg.get("dtype"),
    }
    return {name: value for name, value in found.items() if value not in (None, "")}


def _data_files(block: Any) -> Iterator[str]:
    for part in block if isinstance(block, list) or OmegaConf.is_list(block) else [block or {}]:
        name = part.get("data_files") or part.get("source")
        if name:
            yield str(name)


def _measured(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The run's single figures; curves are in its own summary."""
    single = {
        name: summary.get(name) for name in ("trainable_parameters", "tokens_per_second", "seconds")
    }
    memory = summary.get("memory_gib") or {}
    for name, value in {**single, **{f"memory, GiB: {k}": v for k, v in memory.items()}}.items():
        if isinstance(value, int | float):
            yield name.replace("_", " "), shown(value)
