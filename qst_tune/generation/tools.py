"""Tools that a model may call, for its chat template."""

from pathlib import Path

from torchtune.modules.transforms.tokenizers import ModelTokenizer

from qst_tune.data.chat.messages import read_tools
from qst_tune.data.rows.json_rows import FileText, read_document
from qst_tune.data.values import JsonObject, kind_of
from qst_tune.errors import UserError, first_line


def read_tool_file(path: Path, tokenizer: ModelTokenizer) -> list[JsonObject]:
    """Read a JSON file with a list of schemas in OpenAI's form, at least one.

    Another file, or a tokenizer that takes no tools, is a UserError.
    """
    if not hasattr(tokenizer, "tokenize_conversation"):
        raise UserError(
            f"tools={path}: {type(tokenizer).__name__} takes no tools; use the tokenizer "
            "qst_tune.data.hf_chat_tokenizer"
        )
    try:
        tools = read_tools(read_document(FileText(path.expanduser())))
        for tool in tools or ():
            _check(tool)
    except (ValueError, RuntimeError) as error:  # RuntimeError: no such ~user
        reason = first_line(error).removeprefix(str(path)).lstrip(": ")
        raise UserError(f"tools={path}: {reason}") from error
    if not tools:
        raise UserError(f"tools={path} has no tool; write a list of JSON schemas")
    return tools


def _check(tool: JsonObject) -> None:
    """Refuse a function without a name; a tool of another type is the template's to know."""
    function = tool.get("function", tool)
    if not isinstance(tool.get("type", "function"), str) or not isinstance(function, dict):
        raise UserError(f"{kind_of(tool)} is no JSON schema of a function")
    name = function.get("name")
    if tool.get("type", "function") == "function" and not (isinstance(name, str) and name):
        raise UserError(f"the name of a function is {kind_of(name)}: it must be text")
