"""Chat with a tuned model in the terminal.

Example::

    tune run qst_chat --config smollm2/135M_qst_chat

The config may also be that of the training run, of qst_finetune or of peqa_finetune. The text
appears as it is generated. Ctrl-C breaks an answer off, Ctrl-D ends the program, and /help lists
the commands. Each turn runs the new tokens only.
"""

import sys
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass

from omegaconf import DictConfig
from torchtune import training, utils

from qst_tune.config.check import read_config
from qst_tune.config.cli import run_recipe
from qst_tune.config.keys import key
from qst_tune.config.schema import GenerationConfig
from qst_tune.errors import UserError
from qst_tune.generation.conversation import Conversation
from qst_tune.generation.sampling import Sampling
from qst_tune.results.loading import load_tuned_model


@dataclass(frozen=True, kw_only=True)
class ChatConfig(GenerationConfig):
    """The keys of this recipe."""

    max_new_tokens: int = key("longest answer", default=512, least=1)


HELP = """\
/clear        begin a new conversation
/undo         forget the last question and its answer
/system TEXT  begin a new conversation with this system prompt; without TEXT with none
/exit         end the program, as Ctrl-D does
/help         list the commands
//...         send a text that begins with a slash: //etc sends /etc
Ctrl-C        break an answer off"""

log = utils.get_logger("INFO")


def chat(conversation: Conversation) -> None:
    """Answer what is typed until there is no more."""
    for text in _typed_lines():
        if text.startswith("/") and not text.startswith("//"):
            _obey(conversation, text)
        elif text:
            _answer(conversation, text.removeprefix("/"))


def _typed_lines() -> Iterator[str]:
    """Stripped lines from the terminal, or from a pipe, until its end or /exit."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            text = input(prompt).strip()
        except EOFError:
            return
        if text == "/exit":
            return
        yield text


def _obey(conversation: Conversation, text: str) -> None:
    """Run a command; none of them reaches the model."""
    command, _, rest = text.partition(" ")
    if command == "/help":
        print(HELP)
    elif command == "/clear":
        conversation.clear()
    elif command == "/undo":
        conversation.undo()
    elif command == "/system":
        conversation.system_prompt = rest.strip() or None
        conversation.clear()
    else:
        hint = f"/help lists the commands, /{text} sends this text to the model"
        print(f"error: unknown command {command!r}; {hint}", file=sys.stderr)


def _answer(conversation: Conversation, text: str) -> None:
    try:
        # Closed at once after Ctrl-C, so that the conversation keeps what came until then.
        with closing(conversation.ask(text)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except UserError as error:
        print(f"error: {error} (/clear begins anew)", file=sys.stderr)
        return
    print()
    if conversation.is_full:
        print("error: the context is full (/clear begins anew)", file=sys.stderr)


def main(raw: DictConfig) -> None:
    """Run the recipe."""
    cfg = read_config(raw, ChatConfig)
    training.set_seed(seed=cfg.seed)
    tuned = load_tuned_model(cfg)
    conversation = Conversation(
        tuned.model,
        tuned.tokenizer,
        system_prompt=cfg.system_prompt,
        sampling=Sampling.of_config(cfg),
        max_new_tokens=cfg.max_new_tokens,
    )
    what = tuned.title if tuned.is_tuned else "without anything tuned"
    log.info(f"{tuned.backbone.name}, {what}; /help lists the commands")
    with nullcontext() if tuned.is_tuned else tuned.untuned():
        chat(conversation)


if __name__ == "__main__":
    run_recipe(main, ChatConfig, __doc__)
