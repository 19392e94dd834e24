"""What a run leaves: a directory of trained tensors that can be shared, checked and loaded safely.

==========================================  ====================================================
``side_network.safetensors``, or            the tensors of ``model.side``: fp32 if trained here,
                                            else as they were imported
``scales.safetensors``                      PEQA's scales, fp32, and the zero points if they train
``qst_config.json``, ``peqa_config.json``   their :mod:`~qst_tune.results.description`
``recipe_config.yaml``                      the config of the run that made it
``README.md``                               a model card
``config.json``                             of a side network, for transformers: the type of model,
                                            and where the backbone is
``peft/``                                   of LoRA alone, the same in PEFT's format; see
                                            :mod:`~qst_tune.results.peft_adapter`
==========================================  ====================================================

It has no weight of the backbone, no code of an integer model (whoever has the weights gets the same
ones by rounding again), no pickle, and no ``adapter_config.json`` beside the others: transformers
would take it for the whole result.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torchtune import utils

from qst_tune.atomic_files import write_directory
from qst_tune.backbone.identity import BackboneId
from qst_tune.errors import UserError
from qst_tune.modules.peqa_model import PEQAModel
from qst_tune.modules.side.network import SideNetwork
from qst_tune.results.card import model_card
from qst_tune.results.description import (
    FORMATS,
    SCALES,
    SIDE_NETWORK,
    Ancestor,
    Description,
    ModelBlock,
    SideStructure,
    TunedFormat,
    read_description,
)

CARD_FILE = "README.md"

log = utils.get_logger("INFO")
RECIPE_CONFIG = "recipe_config.yaml"
TRANSFORMERS_MODEL_TYPE = "qst"

_DTYPES = ("F32", "F16", "BF16")  # as safetensors calls them

Tensors = dict[str, torch.Tensor]
Tuned = SideNetwork | PEQAModel  # whose trained tensors a directory has


@dataclass(frozen=True)
class Provenance:
    """How the tensors of a directory came to be.

    Args:
        backbone (BackboneId): what they were trained on.
        model_block (ModelBlock): the ``model`` block of the config, which rebuilds the model.
        recipe_config (str): the run's config, YAML.
        results (Mapping[str, float]): figures for the model card, by name.
        lineage (tuple[Ancestor, ...]): results that it was tuned from, oldest first.
        backbone_path (str): directory of the backbone, where another program looks first.
    """

    backbone: BackboneId
    model_block: ModelBlock
    recipe_config: str
    results: Mapping[str, float] = field(default_factory=dict)
    lineage: tuple[Ancestor, ...] = ()
    backbone_path: str = ""

    @property
    def base_model(self) -> str:
        """Where another program finds the backbone."""
        return self.backbone_path or self.backbone.name

    @classmethod
    def of_directory(cls, directory: Path, backbone_path: str) -> "Provenance":
        """Read how a result came to be, without its figures, which further training makes old.

        ``backbone_path`` is where its backbone is now, or its name on the hub.
        """
        found = read_description(directory)
        text = (directory / RECIPE_CONFIG).read_text(encoding="utf-8")
        return cls(found.backbone, found.model, text, {}, found.lineage, backbone_path)


def tuned_files(tuned: Tuned, provenance: Provenance) -> dict[str, bytes]:
    """Return the directory's files by name."""
    side = tuned if isinstance(tuned, SideNetwork) else None
    plain = {name: value.detach().cpu().contiguous() for name, value in _trained(tuned).items()}
    weights = save(plain, metadata={"format": "pt"})
    description = Description(
        SIDE_NETWORK if side else SCALES,
        provenance.backbone,
        provenance.model_block,
        SideStructure.of(side) if side else None,
        provenance.results,
        provenance.lineage,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
    )
    files = {
        description.form.weights_file: weights,
        description.form.config_file: description.to_json(),
        RECIPE_CONFIG: provenance.recipe_config.encode(),
        CARD_FILE: model_card(description).encode(),
    }
    if side:
        labels = description.model.get("num_labels")
        files["config.json"] = transformers_config(provenance.base_model, labels)
    return files


def transformers_config(backbone: str, num_labels: int | None = None) -> bytes:
    """Write the ``config.json`` for transformers; only a classifier has ``num_labels``.

    ``backbone`` is the backbone's directory, or its name on the hub.
    """
    kind = "QSTForCausalLM" if num_labels is None else "QSTForSequenceClassification"
    names = {str(label): f"LABEL_{label}" for label in range(num_labels or 0)}
    config = {
        "model_type": TRANSFORMERS_MODEL_TYPE,
        "architectures": [kind],
        "backbone": backbone,
        **({"id2label": names} if names else {}),
    }
    return (json.dumps(config, indent=2) + "\n").encode()


def save_tuned(directory: Path, tuned: Tuned, provenance: Provenance) -> None:
    """Write the directory, whole or not at all; UserError if it cannot be written."""
    write_directory(directory, tuned_files(tuned, provenance), private=[RECIPE_CONFIG])


def add_verdict(files: Mapping[str, bytes], verdict: str) -> dict[str, bytes]:
    """Write into a directory's card and description that the run made the model no better."""
    changed = dict(files)
    changed[CARD_FILE] += f"\n**Validation**: {verdict}.\n".encode()
    for name in {form.config_file for form in FORMATS.values()} & changed.keys():
        content = {**json.loads(changed[name]), "verdict": verdict}
        changed[name] = (json.dumps(content, indent=2) + "\n").encode()
    return changed


def load_tuned(directory: Path, tuned: Tuned, *, backbone: BackboneId) -> None:
    """Load a directory into a side network, or its scales into a model, whose codes stay.

    UserError as :func:`read_tuned`; nothing is changed then.
    """
    tensors = read_tuned(directory, tuned, backbone=backbone)
    if isinstance(tuned, SideNetwork):
        tuned.load_state_dict(tensors)
    else:
        tuned.load_task(tensors)


def read_tuned(directory: Path, tuned: Tuned, *, backbone: BackboneId) -> Tensors:
    """Read a directory's tensors, after checking that they belong to this model and backbone.

    UserError if the directory is missing, damaged, of another method or version, was trained on
    another backbone, or has tensors of other names, shapes or function.
    """
    form = SIDE_NETWORK if isinstance(tuned, SideNetwork) else SCALES
    path, description = directory / form.weights_file, read_description(directory, form)
    _check_backbone(directory, description.backbone, backbone)
    check_fits(directory, tuned)
    tensors = read_tensors(directory, form)
    check_finite(path, tensors)
    stored = description.weights_sha256
    if stored and stored != hashlib.sha256(path.read_bytes()).hexdigest():
        raise UserError(
            f"{path} has another SHA-256 than {form.config_file} says: it is damaged or replaced; "
            "copy the whole directory again"
        )
    return tensors


def check_fits(directory: Path, tuned: Tuned) -> None:
    """Compare a directory with a model, perhaps on meta, by the headers of its tensors.

    UserError if names, shapes or function differ.
    """
    form = SIDE_NETWORK if isinstance(tuned, SideNetwork) else SCALES
    structure = read_description(directory, form).structure
    wanted = {name: tuple(value.shape) for name, value in _trained(tuned).items()}
    found = tensor_shapes(directory, form)
    wrong = sorted(n for n in wanted.keys() | found.keys() if wanted.get(n) != found.get(n))
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{directory / form.weights_file} does not fit the model: {len(wrong)} tensors differ, "
            f"for example {name} is {found.get(name, 'absent')} in the file and "
            f"{wanted.get(name, 'absent')} in the model; use the model block of its "
            f"{form.config_file}"
        )
    if structure is None or not isinstance(tuned, SideNetwork):
        return
    differing = structure.differences(SideStructure.of(tuned))
    if differing:
        raise UserError(
            f"{directory} has tensors of this shape for another model: {'; '.join(differing)}; use "
            f"the model block of its {form.config_file}, and for what that leaves to a default the "
            "values there"
        )


def read_tensors(directory: Path, form: TunedFormat) -> Tensors:
    """Read a directory's tensors to the CPU; UserError if they are missing or damaged."""
    tensor_shapes(directory, form)
    tensors: Tensors = load_file(directory / form.weights_file)
    return tensors


def check_finite(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise a UserError if a value of the file's tensors is not finite."""
    broken = [name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise UserError(f"{path}: {len(broken)} tensors are not finite, such as {broken[0]}")


def tensor_shapes(directory: Path, form: TunedFormat) -> dict[str, tuple[int, ...]]:
    """Read the shapes of a directory's tensors from the header of their file.

    UserError if they are missing or damaged, or not what a run writes: numbers in floating point.
    """
    path = directory / form.weights_file
    shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                header = file.get_slice(name)
                if header.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"{path}: {name} is {header.get_dtype()} and must be {', '.join(_DTYPES)}"
                    )
                shapes[name] = tuple(header.get_shape())
        return shapes
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy the whole directory") from None
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is damaged or not a safetensors file ({error}): copy it again"
        ) from error


def _trained(tuned: Tuned) -> Mapping[str, torch.Tensor]:
    # A wrapped module (recomputation, compile) adds prefixes to named_parameters, not to these.
    return tuned.state_dict() if isinstance(tuned, SideNetwork) else tuned.task()


def _check_backbone(directory: Path, there: BackboneId, here: BackboneId) -> None:
    is_same = there.fingerprint in (here.fingerprint, here.sampled)
    if is_same and there.fingerprint != here.fingerprint:
        log.warning(
            f"{directory} has a fingerprint of 64 values of each weight, as qst_tune 0.1 wrote it: "
            f"they are those of {here.name}, and the other values are not checked"
        )
        here = replace(here, fingerprint=there.fingerprint)
    library = there.library or (here.library if is_same else "torchtune")
    if library != here.library:  # until 0.1 every *_from_hf of a known family was torchtune's
        raise UserError(
            f"{directory} was tuned over {there.name} in {library}'s modules, and here "
            f"{here.name} runs in {here.library}'s: use the model block that it was tuned "
            "with, or if that is *_from_hf, which were torchtune's until now, tune it again"
        )
    before, now = asdict(there), asdict(here)
    differing = [
        f"{name} {before[name]!r} there, {now[name]!r} here"
        for name in ("fingerprint", "quantization")
        if before[name] != now[name]
    ]
    if differing:
        raise UserError(
            f"{directory} was trained on another backbone ({there.name}) than "
            f"{here.name}: {'; '.join(differing)}"
        )
