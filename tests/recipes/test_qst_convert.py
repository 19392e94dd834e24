"""The authors' directories through the real `tune`: read, used, written, refused."""

import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from qst_tune.recipes import qst_convert

from qst_tune.errors import UserError
from qst_tune.models.build import build_on_meta
from qst_tune.models.load import load_frozen_backbone
from qst_tune.results.authors.checkpoint import write_authors_directory
from qst_tune.results.description import SIDE_NETWORK, read_description
from qst_tune.results.tuned_directory import load_tuned
from tests.reference import qst_reference as reference
from tests.results.authors.test_conversion import (
    LLAMA,
    LLAMA_CLASSIFIER,
    OPT_CLASSIFIER,
    random_state,
)
from tests.support.checkpoints import Config, finetune_config, write_config
from tests.support.numbers import reference_backbone, reference_shape
from tests.support.opt_models import hf_opt
from tests.support.recipe_runs import merged, tune_here

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return finetune_config(root)


@pytest.fixture(scope="module")
def theirs(root: Path) -> Path:
    torch.manual_seed(0)
    state = random_state({**LLAMA, "reduction_factor": 4, "rank": 7})
    write_authors_directory(root / "theirs", state)
    return root / "theirs"


@pytest.fixture(scope="module")
def imported(root: Path, config: Config, theirs: Path) -> Path:
    path = write_config(root / "config.yaml", config)
    directories = [f"from_authors={theirs}", f"side_network={root / 'side'}"]
    result = tune_here("run", "qst_convert", "--config", path, *directories, cwd=root)
    assert result.returncode == 0, result.stderr
    assert "model.variant=authors model.reduction_factor=4 model.rank=7" in result.stderr
    return root / "side"


# A classifier's directory, as their code leaves it: without the output gate.


@pytest.fixture(scope="module")
def classifier_config(root: Path, config: Config) -> Config:
    return {**config, "model": {**LLAMA_CLASSIFIER, "num_labels": 2, "reduction_factor": 16}}


def same_files(ours: Path, theirs: Path) -> bool:
    """Whether the tensors of the same names are equal bit for bit."""
    for path in theirs.iterdir():
        actual, expected = (torch.load(p, weights_only=True) for p in (ours / path.name, path))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    return {path.name for path in ours.iterdir()} == {path.name for path in theirs.iterdir()}


def test_a_classifiers_directory_comes_back_and_computes_what_the_authors_equations_do(
    root: Path, classifier_config: Config
):
    """Theirs to ours to theirs through `tune`; the gate that they lost has its start, ones."""
    state = random_state({**LLAMA_CLASSIFIER, "reduction_factor": 4, "rank": 7})
    state["score_z"] = torch.ones_like(state["score_z"])
    whole, theirs, ours, back = (root / f"classifier_{name}" for name in ("whole", *"abc"))
    write_authors_directory(whole, state)
    shutil.copytree(whole, theirs, ignore=lambda *_: ["score_z_path.pt"])
    convert = ("run", "qst_convert", "--config", write_config(root / "c.yaml", classifier_config))
    imported = tune_here(*convert, f"from_authors={theirs}", f"side_network={ours}", cwd=root)
    assert imported.returncode == 0, imported.stderr
    assert "model.reduction_factor=4 model.rank=7 model.num_labels=3" in imported.stderr
    exported = tune_here(*convert, f"side_network={ours}", f"to_authors={back}", cwd=root)
    assert exported.returncode == 0, exported.stderr
    assert "num_labels=3" in exported.stderr
    assert same_files(back, whole)
    model, _ = loaded(ours, classifier_config)
    tokens = torch.randint(1, LLAMA["vocab_size"], (2, 9))
    tokens[1, 6:] = 0
    shapes = (reference_shape(model.layers), reference_shape(model.side.blocks))
    expected = reference.llama_classifier(reference_backbone(model), state, tokens, *shapes, 0)
    # fp32 sums in another order, as below.
    logits = model(tokens, padding_mask=tokens != 0)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)


def test_an_opt_classifiers_directory_comes_back(tmp_path: Path, config: Config):
    state = random_state({**OPT_CLASSIFIER, "reduction_factor": 3, "rank": 5})
    write_authors_directory(tmp_path / "theirs", state)
    hf_opt().save_pretrained(tmp_path / "model")
    checkpointer = {
        "_component_": "qst_tune.training.HFCheckpointer",
        "checkpoint_dir": str(tmp_path / "model"),
    }
    model = {**OPT_CLASSIFIER, "checkpoint_dir": str(tmp_path / "model")}
    cfg = {**config, "model": model, "checkpointer": checkpointer}
    ours = f"side_network={tmp_path / 'ours'}"
    qst_convert.main(merged(cfg, f"from_authors={tmp_path / 'theirs'}", ours))
    qst_convert.main(merged(cfg, ours, f"to_authors={tmp_path / 'back'}"))
    assert same_files(tmp_path / "back", tmp_path / "theirs")


def loaded(directory: Path, config: Config):
    """The directory's model over its quantised backbone, loaded like any side network of ours."""
    cfg = OmegaConf.create({**config, "model": read_description(directory, SIDE_NETWORK).model})
    model = build_on_meta(cfg.model, torch.float32)
    backbone = load_frozen_backbone(model, cfg.checkpointer, dtype=torch.float32, device=CPU)
    model.initialize_side(CPU)
    load_tuned(directory, model.side, backbone=backbone)
    return model, cfg


def test_an_imported_directory_computes_what_the_authors_equations_do(imported, theirs, config):
    model, cfg = loaded(imported, config)
    tokens = torch.randint(0, LLAMA["vocab_size"], (2, 9))
    expected = reference.forward(
        reference_backbone(model),
        qst_convert.export_authors(imported, cfg.model)[0],
        tokens,
        reference_shape(model.layers),
        reference_shape(model.side.blocks),
    )
    # fp32 sums in another order; logits of this random side network reach 300.
    torch.testing.assert_close(model(tokens), expected["logits"], rtol=1e-4, atol=1e-3)


def test_an_export_is_what_was_imported(imported, theirs, config, root: Path):
    back = root / "back"
    qst_convert.main(merged(config, f"side_network={imported}", f"to_authors={back}"))
    assert same_files(back, theirs)


def test_a_hostile_pickle_is_one_line_and_leaves_nothing(root: Path, config: Config, theirs: Path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(root / "owned"), "w"))

    hostile = root / "hostile"
    hostile.mkdir()
    for path in theirs.iterdir():
        (hostile / path.name).write_bytes(path.read_bytes())
    torch.save({"0": Hostile()}, hostile / "qst_z_parameters.pt")
    path = write_config(root / "hostile.yaml", config)
    directories = [f"from_authors={hostile}", f"side_network={root / 'new'}"]
    result = tune_here("run", "qst_convert", "--config", path, *directories, cwd=root)
    assert result.returncode == 2
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "qst_z_parameters.pt is not a plain state dict and was not loaded" in line
    assert "Traceback" not in result.stderr
    assert not (root / "owned").exists()
    assert not (root / "new").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], "name two directories"),
        (["from_authors=a"], "name two directories"),
        (["side_network=a"], "name two directories"),
        (["from_authors=a", "to_authors=b", "side_network=c"], "name two directories"),
        (["from_authors=absent", "side_network=new"], "absent/qst_layers_parameters.pt is missing"),
        (["from_authors=absent", "side_network={root}"], "exists already: name a new directory"),
        (["to_authors={root}", "side_network=a"], "exists already: name a new directory"),
        (["to_authors=new", "side_network=absent"], "absent is not a QST side network"),
        (["from_autors=a", "side_network=b"], "did you mean 'from_authors'?"),
    ],
)
def test_mistakes_are_named(overrides, expected, config: Config, root: Path):
    with pytest.raises(UserError) as error:
        qst_convert.main(merged(config, *(text.format(root=root) for text in overrides)))
    assert expected in str(error.value)
