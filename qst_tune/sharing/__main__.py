"""``python -m qst_tune.sharing``: inspect, verify, share or push what a run left.

Examples::

    python -m qst_tune.sharing inspect runs/135M_qst/side_network
    python -m qst_tune.sharing verify runs/135M_qst/side_network SmolLM2-135M-Instruct
    python -m qst_tune.sharing share runs/135M_qst/side_network new_directory \
        --name me/pythonic --base-model HuggingFaceTB/SmolLM2-135M-Instruct --license apache-2.0
    python -m qst_tune.sharing push new_directory me/pythonic --private
"""

import argparse
from pathlib import Path

from qst_tune.backbone.hub import local_model
from qst_tune.errors import one_line_errors
from qst_tune.sharing.hub_directory import Publication, base_model_of, make_hub_directory
from qst_tune.sharing.inspection import inspect_directory, verify_directory
from qst_tune.sharing.push import push_directory
from qst_tune.terminal import safe_streams


def main(arguments: list[str] | None = None) -> None:
    """Run one command; a user's mistake is one line and exit status 2."""
    asked = _parser().parse_args(arguments)
    with safe_streams(), one_line_errors():
        print(_answer(asked))


def _answer(asked: argparse.Namespace) -> str:
    if asked.command == "inspect":
        return inspect_directory(asked.directory)
    if asked.command == "verify":
        backbone = verify_directory(asked.directory, local_model(asked.backbone))
        return (
            f"{asked.directory} belongs to {backbone.name} ({backbone.quantization}) and is whole"
        )
    if asked.command == "push":
        return push_directory(asked.directory, asked.name, private=asked.private)
    base_model = asked.base_model or base_model_of(asked.directory)
    publication = Publication(asked.name, base_model, asked.license, asked.data)
    secrets = make_hub_directory(asked.directory, asked.target, publication)
    lines = [f"{asked.target} is ready: read its README.md, then"]
    lines.append(f"python -m qst_tune.sharing push {asked.target} {asked.name}")
    if secrets:
        lines.insert(
            0, f"left out, {len(secrets)} settings that look like secrets: {', '.join(secrets)}"
        )
    if not asked.license:
        lines.insert(
            0, "warning: without --license nobody may use it; the backbone's own terms apply too"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m qst_tune.sharing")
    commands = parser.add_subparsers(dest="command", required=True)
    inspect = commands.add_parser("inspect", help="provenance, sizes, gates")
    verify = commands.add_parser("verify", help="does it belong to this backbone?")
    share = commands.add_parser("share", help="make a directory for a model hub")
    push = commands.add_parser("push", help="upload it to the Hugging Face Hub")
    for command in (inspect, verify, share, push):
        command.add_argument("directory", type=Path, help="of a side network (or of scales)")
    verify.add_argument("backbone", help="directory of the backbone, or its name on the hub")
    share.add_argument("target", type=Path, help="a new directory")
    share.add_argument("--name", required=True, help="under which others will load it")
    share.add_argument("--base-model", help="hub name of the backbone, unless the run used it")
    share.add_argument("--license", help="of the side network, such as apache-2.0")
    share.add_argument("--data", help="what it was trained on")
    push.add_argument("name", help="org/name of the repository, made if it is not there")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    return parser


if __name__ == "__main__":
    main()
