"""What transformers' own server needs for side networks, and what it lacks at its edges.

``serve`` of transformers 5.23 answers a text that reaches the end of the model's context with
status 500, and so a malformed request; it asks no registry for the model's class; a pinned server
can be told to load another model; ``/v1/models`` needs a cache of the hub; and a page in a browser
can reach a server on loopback under a name of its own. This is one of two exceptions to the rule
that nothing is monkey-patched (CONTRIBUTING.md).
"""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import constants
from transformers import GenerationConfig, PreTrainedModel

from qst_tune.transformers import QSTForCausalLM

_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# As an address bar and a client write them; of "[::1]:8000" starlette compares what is before ":".
_LOCAL_HOSTS = ["localhost", "127.0.0.1", "["]


def prepare_server(arguments: list[str]) -> None:
    """Change transformers' server for the arguments of a ``serve`` command."""
    # It asks no registry: it looks the class up here by its name.
    transformers.QSTForCausalLM = QSTForCausalLM  # type: ignore[attr-defined]
    serving = "transformers.cli.serving"
    manager = import_module(f"{serving}.utils").GenerateManager
    for name in ("generate_streaming", "generate_non_streaming"):
        setattr(manager, name, _within_context(getattr(manager, name)))
    models = import_module(f"{serving}.model_manager").ModelManager
    models.get_gen_models = _list_of_models(models.get_gen_models)
    server: Any = import_module(f"{serving}.server")
    server.build_server = _guarded(server.build_server, _host_of(arguments) in _LOOPBACK)


def _host_of(arguments: list[str]) -> str:
    for index, argument in enumerate(arguments):
        if argument.startswith("--host="):
            return argument.removeprefix("--host=")
        if argument == "--host" and index + 1 < len(arguments):
            return arguments[index + 1]
    return "localhost"


def fit_context(model: PreTrainedModel, inputs: Any, generation: GenerationConfig) -> None:
    """Let an answer end with the model's context, for the reason "length".

    Raises HTTPException with status 400 if the prompt leaves no room.
    """
    from fastapi import HTTPException

    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is None:
        return
    tokens = inputs["input_ids"]
    length = len(tokens) if isinstance(tokens, list) else tokens.shape[-1]
    if length >= limit:
        raise HTTPException(
            400, f"the prompt has {length} tokens, and the model's context {limit}: shorten it"
        )
    wanted = generation.max_new_tokens
    generation.max_new_tokens = limit - length if wanted is None else min(wanted, limit - length)


def _within_context(generate: Callable[..., Any]) -> Callable[..., Any]:
    def fitted(
        self: object,
        model: PreTrainedModel,
        processor: object,
        inputs: Any,
        gen_config: GenerationConfig,
        **options: object,
    ) -> Any:
        fit_context(model, inputs, gen_config)
        return generate(self, model, processor, inputs, gen_config, **options)

    return fitted


def _list_of_models(cached: Callable[..., Any]) -> Callable[..., Any]:
    """List the model that every request must name, or those of the hub's cache if there is one."""

    def get_gen_models(self: Any, cache_dir: str | None = None) -> Any:
        if self.force_model is not None:
            return [{"id": self.force_model, "object": "model", "owned_by": "", "created": 0}]
        is_there = Path(cache_dir or constants.HF_HUB_CACHE).is_dir()
        return cached(cache_dir) if is_there else []

    return get_gen_models


def _guarded(build: Callable[..., Any], is_local: bool) -> Callable[..., Any]:
    def build_server(model_manager: object, *arguments: object, **options: object) -> Any:
        app = build(model_manager, *arguments, **options)
        guard(app, model_manager, is_local=is_local)
        return app

    return build_server


def guard(app: Any, model_manager: Any, *, is_local: bool) -> None:
    """Answer malformed requests with 400, keep the pinned model, and check Host on loopback."""
    from fastapi import HTTPException
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from jinja2 import TemplateError
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    async def refuse(_: object, error: Exception) -> JSONResponse:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return JSONResponse({"error": f"the request cannot be answered: {reason}"}, status_code=400)

    kinds = (AttributeError, KeyError, TypeError, ValueError, TemplateError, RequestValidationError)
    for kind in kinds:
        app.add_exception_handler(kind, refuse)
    if is_local:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=_LOCAL_HOSTS)
    pinned = model_manager.force_model
    if pinned is None:
        return
    named = model_manager.process_model_name

    def process_model_name(name: str) -> Any:
        if name != pinned:
            raise HTTPException(400, f"the server is pinned to {pinned!r}")
        return named(name)

    model_manager.process_model_name = process_model_name
