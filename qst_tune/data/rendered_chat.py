"""A conversation with its rendering and renderings of its first messages."""

from dataclasses import dataclass, replace

from qst_tune.data.chat_template import ChatTemplate, Messages, Tools
from qst_tune.data.turn_end import TurnEnd
from qst_tune.errors import UserError

Span = tuple[int, int]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation and its rendering."""

    template: ChatTemplate
    messages: Messages  # from check_messages
    tools: Tools | None  # JSON schemas of the tools that the model may call
    text: str  # the rendering
    turn_end: TurnEnd  # how the template ends an answer

    def rerender(self, messages: Messages, tools: Tools | None) -> "RenderedChat | None":
        """Render other messages with the same template; None if it refuses them."""
        try:
            text = self.template.render(messages, tools=tools)
        except UserError:
            return None
        return replace(self, messages=messages, tools=tools, text=text)

    def prompt(self, index: int) -> str | None:
        """Render what comes before a message; None if the template refuses that.

        Before an assistant's message the text ends with the generation prompt, as at inference.
        Before another first message it is empty.
        """
        if self.messages[index]["role"] == "assistant":
            return self._render(self.messages[:index], add_generation_prompt=True)
        return self.up_to(index) if index else ""

    def up_to(self, count: int) -> str | None:
        """Render the first messages, without the end of a conversation; None if refused."""
        text = self._render(self.messages[:count], add_generation_prompt=False)
        return text and text.removesuffix(self.turn_end.tail)

    def without_space(self, start: int, end: int) -> Span:
        """Drop the white space that follows a message's end token: generation stops before it."""
        ends = [match.end() for match in self.turn_end.special.finditer(self.text, start, end)]
        if ends and not self.text[ends[-1] : end].strip():
            end = ends[-1]
        return start, end

    def ends_with_special(self, start: int, end: int) -> bool:
        """Whether the last characters of a range are a special token."""
        # No special token is longer, and an answer may be long.
        found = self.turn_end.special.finditer(self.text, max(start, end - 64), end)
        return any(match.end() == end for match in found)

    def lost(self, index: int, why: str) -> UserError:
        """Return the error for a message that is not found in the rendering."""
        return UserError(
            f"{self.name(index)} cannot be found in the rendering of the chat template: {why}; "
            "take no loss on it, or use another template (tokenizer.chat_template)"
        )

    def name(self, index: int) -> str:
        """Return the name of a message for errors."""
        return f"message {index} ({self.messages[index]['role']})"

    def _render(self, messages: Messages, *, add_generation_prompt: bool) -> str | None:
        try:
            return self.template.render(
                messages, tools=self.tools, add_generation_prompt=add_generation_prompt
            )
        except UserError:
            return None
