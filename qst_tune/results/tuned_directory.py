"""What a run leaves: a directory of trained tensors that can be shared, checked and loaded safely.

Every method writes the same four files: the trained tensors (safetensors), their description (JSON:
method, format, model block, structure, the backbone's name and fingerprint), the run's config and a
model card. It has no weight of the backbone, no pickle, and no ``adapter_config.json``, which PEFT
would misread.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from qst_tune import __version__
from qst_tune.backbone.identity import BackboneId
from qst_tune.errors import UserError
from qst_tune.json_files import read_json
from qst_tune.results.lineage import describe_lineage

FORMAT_VERSION = 2  # 1 had no structure
CARD_FILE = "README.md"
DESCRIPTION_FILES = ("qst_config.json", "peqa_config.json")


@dataclass(frozen=True)
class TunedFormat:
    """How a method names the files of its directory; ``title`` is for people: "QST side network".

    ``origin`` is which recipe writes it, and where to.
    """

    method: str
    title: str
    weights_file: str
    config_file: str
    origin: str


@dataclass(frozen=True)
class Provenance:
    """How the tensors of a directory came to be.

    Args:
        backbone (BackboneId): what they were trained on.
        model_block (dict[str, Any]): the ``model`` block of the config, which rebuilds the model.
        recipe_config (str): the run's config, YAML.
        results (dict[str, float]): figures for the model card, by name.
        lineage (Sequence[dict[str, Any]]): results that it was tuned from, oldest first.
        backbone_path (str): directory of the backbone, where another program looks first.
    """

    backbone: BackboneId
    model_block: dict[str, Any]
    recipe_config: str
    results: dict[str, float] = field(default_factory=dict)
    lineage: Sequence[dict[str, Any]] = ()
    backbone_path: str = ""


def tuned_files(
    form: TunedFormat,
    tensors: Mapping[str, torch.Tensor],
    provenance: Provenance,
    *,
    about: str,
    structure: dict[str, Any] | None = None,
) -> dict[str, bytes]:
    """Return the directory's files by name.

    ``about`` is the first paragraph of the model card; ``structure`` is what the tensors' names and
    shapes leave open of the model.
    """
    description = {
        "method": form.method,
        "format_version": FORMAT_VERSION,
        "qst_tune_version": __version__,
        "backbone": asdict(provenance.backbone),
        "model": provenance.model_block,
        "structure": structure or {},
        "results": provenance.results,
        **({"lineage": list(provenance.lineage)} if provenance.lineage else {}),
    }
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return {
        form.weights_file: save(plain, metadata={"format": "pt"}),
        form.config_file: (json.dumps(description, indent=2) + "\n").encode(),
        "recipe_config.yaml": provenance.recipe_config.encode(),
        CARD_FILE: _model_card(form, provenance, about).encode(),
    }


def add_verdict(files: Mapping[str, bytes], verdict: str) -> dict[str, bytes]:
    """Write into a directory's card and description that the run made the model no better."""
    changed = dict(files)
    for name, content in files.items():
        if name == CARD_FILE:
            changed[name] = content + f"\n**Validation**: {verdict}.\n".encode()
        elif name in DESCRIPTION_FILES:
            description = {**json.loads(content), "verdict": verdict}
            changed[name] = (json.dumps(description, indent=2) + "\n").encode()
    return changed


def load_tuned(
    form: TunedFormat,
    directory: Path,
    expected: Mapping[str, torch.Tensor],
    *,
    backbone: BackboneId,
) -> dict[str, torch.Tensor]:
    """Read a directory's tensors, after checking that they belong to this model and backbone.

    ``expected`` are the model's own, for their names and shapes. UserError if the directory is
    missing, damaged, of another method or version, was trained on another backbone, or has other
    tensors.
    """
    description = read_description(directory, form)
    _check_backbone(directory, description, backbone)
    tensors = read_tensors(directory, form)
    _check_tensors(form, directory, tensors, expected)
    return tensors


def read_description(directory: Path, form: TunedFormat) -> dict[str, Any]:
    """Read and check a directory's description.

    UserError if it is missing, not JSON, or of another method or a newer format.
    """
    path = directory / form.config_file
    if not path.is_file():
        raise UserError(
            f"{directory} is not a {form.title}: it has no {form.config_file}; name a directory "
            f"that {form.origin}"
        )
    description = read_json(path)
    if description.get("method") != form.method:
        raise UserError(f"{path} does not describe a {form.title}")
    version = description.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{path} has format {version}, this qst_tune {__version__} reads format "
            f"{FORMAT_VERSION}: install the qst_tune that wrote it "
            f"({description.get('qst_tune_version')})"
        )
    return description


def _check_backbone(directory: Path, description: dict[str, Any], backbone: BackboneId) -> None:
    trained_on = description.get("backbone") or {}
    is_same = trained_on.get("fingerprint") == backbone.fingerprint
    library = trained_on.get("library", backbone.library if is_same else "torchtune")
    if library != backbone.library:  # until 0.1 every *_from_hf of a known family was torchtune's
        raise UserError(
            f"{directory} was tuned over {trained_on.get('name')} in {library}'s modules, and here "
            f"{backbone.name} runs in {backbone.library}'s: use the model block that it was tuned "
            "with, or if that is *_from_hf, which were torchtune's until now, tune it again"
        )
    differing = [
        f"{field} {trained_on.get(field)!r} there, {value!r} here"
        for field, value in asdict(backbone).items()
        if field in ("fingerprint", "quantization") and trained_on.get(field) != value
    ]
    if differing:
        raise UserError(
            f"{directory} was trained on another backbone ({trained_on.get('name')}) than "
            f"{backbone.name}: {'; '.join(differing)}"
        )


def read_tensors(directory: Path, form: TunedFormat) -> dict[str, torch.Tensor]:
    """Read a directory's tensors to the CPU; UserError if they are missing or damaged."""
    path = directory / form.weights_file
    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the whole directory") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or not a safetensors file ({error}): copy it again"
        ) from error
    return tensors


def _check_tensors(
    form: TunedFormat,
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
) -> None:
    wanted = {name: tuple(value.shape) for name, value in expected.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted == found:
        return
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    example = wrong[0]
    raise UserError(
        f"{directory / form.weights_file} does not fit the model: {len(wrong)} tensors differ, for "
        f"example {example} is {found.get(example, 'absent')} in the file and "
        f"{wanted.get(example, 'absent')} in the model; use the model block of its "
        f"{form.config_file}"
    )


def shown(figure: float) -> str:
    """Format a figure for people: all digits of a count, four of a measurement."""
    return f"{figure:,}" if isinstance(figure, int) else f"{figure:,.4g}"


def table(title: str, rows: Mapping[str, Any]) -> str:
    """Write names and values, if there are any, as a table in Markdown."""
    lines = [f"| {name} | {value} |" for name, value in rows.items()]
    if not lines:
        return ""
    return "\n".join([f"| {title} | |", "| --- | --- |", *lines])


def _model_card(form: TunedFormat, provenance: Provenance, about: str) -> str:
    return f"""# A {form.title} for {provenance.backbone.name}

{about}

{table("model block", provenance.model_block)}

{table("result", {name: shown(value) for name, value in provenance.results.items()})}

{describe_lineage(provenance.lineage)}The run's config is in `recipe_config.yaml`.
"""
