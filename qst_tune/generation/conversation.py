"""A conversation whose caches live between its turns, with its text as it is generated."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

from torchtune.data import Message
from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.data.values import JsonObject, check_unicode
from qst_tune.errors import UserError
from qst_tune.generation.caches import Decoder
from qst_tune.generation.sampling import Sampling
from qst_tune.generation.sequence import CachedSequence, continue_sequence

# A byte decoder writes it for an incomplete character.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Conversation:
    """Turns of a user and a model.

    Each turn is tokenized with all turns before it, exactly as the chat template writes a whole
    conversation, and their common beginning comes from the caches. So the answers are those of a
    model that reads everything again, while normally only the new turn is run.
    ``messages`` are all turns so far; ``system_prompt`` may be changed between two.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: ModelTokenizer,
        *,
        system_prompt: str | None = None,
        sampling: Sampling | None = None,
        max_new_tokens: int = 512,
    ) -> None:
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.max_new_tokens = max_new_tokens
        self.messages: list[Message] = []
        self.system_prompt = system_prompt
        self._sequence = CachedSequence(model)

    @property
    def is_full(self) -> bool:
        """Whether the last answer ended because the context did."""
        return bool(len(self._sequence.tokens) >= self._sequence.model.max_seq_len)

    def clear(self) -> None:
        """Start again with only the system prompt."""
        self.messages = []

    def undo(self) -> None:
        """Forget the last turn of the user and the model's answer to it."""
        self.messages = self.messages[:-2]

    def ask(self, text: str) -> Generator[str, None, None]:
        """Add a turn of the user, generate the model's and yield its text piece by piece.

        Both are part of the conversation once the generator is exhausted or closed; an interrupted
        answer is kept as far as it came. A conversation without room for an answer is a UserError.
        """
        turns = [*self.messages, Message(role="user", content=text, masked=True)]
        prompt = prompt_tokens(self.tokenizer, turns, system_prompt=self.system_prompt)
        self._check_room(len(prompt))
        tokens = continue_sequence(
            self._sequence,
            prompt,
            sampling=self.sampling,
            stop_tokens=self.tokenizer.stop_tokens,
            max_new_tokens=self.max_new_tokens,
        )
        answer = ""
        try:
            for piece in text_pieces(tokens, self.tokenizer.decode):
                answer += piece
                yield piece
        finally:
            self.messages = [*turns, Message(role="assistant", content=answer)]

    def _check_room(self, num_tokens: int) -> None:
        longest = self._sequence.model.max_seq_len
        if num_tokens > longest:
            raise UserError(
                f"the context is full: the conversation has {num_tokens} tokens with this turn and "
                f"the model has room for {longest}; start again, or ask something shorter"
            )


def prompt_tokens(
    tokenizer: ModelTokenizer,
    messages: Sequence[Message],
    *,
    system_prompt: str | None = None,
    tools: Sequence[JsonObject] | None = None,
) -> list[int]:
    """Tokenize a conversation up to where the model's answer begins.

    The last of ``messages`` is the user's; ``tools`` are JSON schemas, for a tokenizer of ours.
    """
    for text in (system_prompt or "", *(message.text_content for message in messages)):
        check_unicode(text, "a prompt")
    system = [Message(role="system", content=system_prompt, masked=True)] if system_prompt else []
    # torchtune's tokenizers open the answer's turn for an empty assistant message.
    turns = [*system, *messages, Message(role="assistant", content="")]
    if tools:
        dicts = [{"role": turn.role, "content": turn.text_content} for turn in turns]
        with_tools = tokenizer.tokenize_conversation(dicts, tools=tools, add_end_tokens=False)
        return list(with_tools[0])
    return list(tokenizer({"messages": turns}, inference=True)["tokens"])


def text_pieces(tokens: Iterable[int], decode: Callable[[list[int]], str]) -> Iterator[str]:
    """Decode token ids as they come, and yield the new text in whole characters."""
    ids: list[int] = []
    shown = text = ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if not text.endswith(_INCOMPLETE):
            yield text[len(shown) :]
            shown = text
    if text != shown:
        yield text[len(shown) :]
