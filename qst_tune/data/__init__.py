"""Tokenizers, datasets and message transforms that torchtune lacks."""

from qst_tune.data.chat_template import ChatTemplate
from qst_tune.data.chat_tokenizer import HFChatTokenizer, hf_chat_tokenizer

__all__ = ["ChatTemplate", "HFChatTokenizer", "hf_chat_tokenizer"]
