"""``config.json`` of a Hugging Face folder, read so that nothing in it is overlooked.

A setting that changes what a model computes and that nobody reads is a silently wrong model. So
every key must be asked for, or stand in :data:`HARMLESS`; any other is refused by name.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from qst_tune.errors import UserError

T = TypeVar("T")

# Keys that say nothing of what a frozen model without dropout computes.
HARMLESS = frozenset(
    {
        # What it is called, and who wrote it with what.
        "_commit_hash",
        "_name_or_path",
        "is_llama_config",
        "max_sequence_length",  # Llama 1 and what came of it; transformers reads it nowhere
        "transformers.js_config",
        "transformers_version",
        "unsloth_fixed",
        "unsloth_version",
        # In which dtype and by which kernel; the recipe's dtype decides.
        "_attn_implementation",
        "_attn_implementation_autoset",
        "_flash_attn_2_enabled",
        "attn_implementation",
        "chunk_size_feed_forward",
        "dtype",
        "torch_dtype",
        "pretraining_tp",  # splits products that are the same when whole
        # Training from scratch.
        "activation_dropout",
        "attention_dropout",
        "dropout",
        "embd_pdrop",
        "init_std",
        "initializer_range",
        "layerdrop",
        "resid_pdrop",
        # Generation, tokens and other tasks, for which there are files of their own.
        "bad_words_ids",
        "bos_token_id",
        "cache_implementation",
        "do_sample",
        "eos_token_id",
        "finetuning_task",
        "id2label",
        "is_decoder",
        "label2id",
        "max_length",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "prefix",
        "problem_type",
        "return_dict",
        "task_specific_params",
        "tie_last_hidden_states",
        "temperature",
        "tokenizer_class",
        "top_k",
        "top_p",
        "unk_token_id",
        "use_cache",
    }
)


class HFConfig:
    """The settings of a model; each is taken by name, and :meth:`finish` refuses what is left.

    Args:
        folder (Path): where it comes from, for messages.
        settings (Mapping[str, Any]): the content of ``config.json``.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self.folder = folder
        self._settings = settings
        self._taken: set[str] = set()

    def problem(self, text: str) -> UserError:
        """Make the error that says what is wrong.

        Args:
            text (str): names the setting and its value.

        Returns:
            UserError: to be raised.
        """
        return UserError(f"{self.folder / 'config.json'}: {text}")

    def take(self, name: str, default: Any = None) -> Any:
        """Return any setting.

        Args:
            name (str): key.
            default (Any): what transformers takes where it is absent or null.

        Returns:
            Any: the value.
        """
        self._taken.add(name)
        value = self._settings.get(name)
        return default if value is None else value

    def whole(self, name: str, default: int | None = None) -> int:
        """Return a whole number above 0.

        Args:
            name (str): key.
            default (int | None): where it is absent; None: it must be there.

        Returns:
            int: the value.

        Raises:
            UserError: if it is missing or no such number.
        """
        value = self.take(name, default)
        if value is None:
            raise self.problem(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise self.problem(f"{name}={value!r} must be a whole number above 0")
        return value

    def number(self, name: str, default: float | None) -> float:
        """Return a number above 0.

        Args:
            name (str): key.
            default (float | None): where it is absent; None only if it is not.

        Returns:
            float: the value.

        Raises:
            UserError: if it is no such number.
        """
        value = self.take(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.problem(f"{name}={value!r} must be a number above 0")
        return float(value)

    def limit(self, name: str, default: float | None) -> float | None:
        """Return a number above 0 of which null says that there is none.

        Args:
            name (str): key.
            default (float | None): where it is absent.

        Returns:
            float | None: the value.

        Raises:
            UserError: if it is no such number.
        """
        self._taken.add(name)
        is_off = self._settings.get(name, default) is None
        return None if is_off else self.number(name, default)

    def choice(self, name: str, default: T, supported: Mapping[T, T] | None = None) -> T:
        """Return a setting of which only some values are supported.

        Args:
            name (str): key.
            default (T): where it is absent.
            supported (Mapping[T, T] | None): what each value stands for; None: ``default`` alone.

        Returns:
            T: what the value stands for.

        Raises:
            UserError: naming the value, if it is another one.
        """
        known = {default: default} if supported is None else supported
        value = self.take(name, default)
        for key, meaning in known.items():
            if value == key and type(value) is type(key):
                return meaning
        names = " or ".join(map(repr, known))
        raise self.problem(f"{name}={value!r} is not supported, only {names}")

    def flag(self, name: str, default: bool) -> bool:
        """Return a setting that is true or false.

        Args:
            name (str): key.
            default (bool): where it is absent.

        Returns:
            bool: the value.
        """
        return self.choice(name, default, {True: True, False: False})

    def finish(self) -> None:
        """Refuse what nobody took; null means that a setting is off.

        Raises:
            UserError: naming every such setting.
        """
        left = [
            f"{name}={value!r}"
            for name, value in self._settings.items()
            if value is not None and name not in self._taken and name not in HARMLESS
        ]
        if left:
            raise self.problem(
                f"{', '.join(left)} is not known and may change what the model computes; remove "
                "it from the file if it does not"
            )
