"""Shoal's own routes beside vLLM's: the page, what was pruned, and the models with it."""

import base64
import hashlib
import re
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from starlette.responses import HTMLResponse, JSONResponse

import pruning
from pruning.models.checkpoint import Manifest
from server.errors import error_response
from server.inventory import Inventory


def describe(manifest: Manifest | None, inventory: Inventory, draft: Manifest | None = None) -> dict[str, Any]:
    """What `/v1/pruning` answers: the manifests and the numbers of the running engine."""
    return {
        "pruned": manifest is not None,
        "manifest": manifest.model_dump(exclude={"files", "digest"}) if manifest else None,
        "draft": draft.model_dump(exclude={"files", "digest"}) if draft else None,
        "sublayers": list(inventory.blocks),
        "kv_heads": inventory.kv_heads() | {"full_heads": {str(b): list(h) for b, h in inventory.full_heads.items()}},
        "kv_cache": {
            "bytes_per_token": inventory.kv_bytes_per_token,
            "bytes_per_token_dense": inventory.kv_bytes_per_token_dense,
            "tokens": inventory.capacity_tokens,
            "tokens_dense": inventory.capacity_tokens_dense,
            "contexts": [asdict(context) for context in inventory.contexts],
            "notes": [*inventory.notes, *inventory.warnings],
        },
        "weight_bytes": inventory.weight_bytes,
        "weight_bytes_dense": inventory.weight_bytes_dense,
    }


def summarise(manifest: Manifest | None, inventory: Inventory) -> dict[str, Any]:
    """What a model's entry in `/v1/models` says of its pruning."""
    gone = {
        kind: [block for block, states in enumerate(inventory.blocks) if states[kind] in ("removed", "emulated")]
        for kind in ("attention", "ffn")
    }
    return {
        "pruned": manifest is not None,
        "base_model": manifest.base.get("model") if manifest else None,
        "blocks": len(inventory.blocks),
        "attention_removed": gone["attention"],
        "attention_limited": [b for b, states in enumerate(inventory.blocks) if states["attention"] == "limited"],
        "kv_heads": inventory.kv_heads(),
        "ffn_removed": gone["ffn"],
        "ffn_narrowed": [b for b, states in enumerate(inventory.blocks) if states["ffn"] == "narrowed"],
        "ffn_skipped": [b for b, states in enumerate(inventory.blocks) if states["ffn"] == "skipped"],
        "emulated": inventory.count("attention", "emulated") + inventory.count("ffn", "emulated"),
        "kv_bytes_per_token": inventory.kv_bytes_per_token,
        "kv_bytes_per_token_dense": inventory.kv_bytes_per_token_dense,
    }


def page() -> tuple[str, dict[str, str]]:
    """The page and its headers; only its own style and script run, and it talks to this server alone."""
    html = files("server").joinpath("static/index.html").read_text(encoding="utf-8")
    own = " ".join(
        f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}';"
        for tag, text in re.findall(r"<(style|script)>(.*?)</\1>", html, re.DOTALL)
    )
    policy = (
        f"default-src 'none'; {own} connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


def router(
    manifest: Manifest | None,
    inventory: Inventory,
    model_cards: Callable[[], Awaitable[dict[str, Any]]],
    draft: Manifest | None = None,
    vllm_version: str = "",
) -> APIRouter:
    """The routes.

    Args:
        manifest: Of a pruned checkpoint, None for a dense model.
        inventory: What is served.
        model_cards: vLLM's own answer to `/v1/models`.
        draft: Of the checkpoint that drafts, where there is one.
        vllm_version: Of the engine.
    """
    description, summary = describe(manifest, inventory, draft), summarise(manifest, inventory)
    html, headers = page()
    own = APIRouter()

    @own.get("/", include_in_schema=False)
    async def show_page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)

    @own.get("/v1/pruning")
    async def show_pruning() -> JSONResponse:
        """What was removed, what it cost, and what the running engine's KV cache holds."""
        return JSONResponse(description)

    async def cards() -> dict[str, Any]:
        """vLLM's list; each entry also says what was removed (adapters: from the model they sit on), none its path."""
        listed = await model_cards()
        for card in listed["data"]:
            card["root"], card["pruning"] = card["id"], summary
        return listed

    @own.get("/v1/models", include_in_schema=False)
    async def show_models() -> JSONResponse:
        return JSONResponse(await cards())

    @own.get("/v1/models/{model:path}")
    async def show_model(model: str) -> JSONResponse:
        """One of the models."""
        for card in (await cards())["data"]:
            if card["id"] == model:
                return JSONResponse(card)
        return error_response(404, "model_not_found", f"The model `{model[:200]}` does not exist.", param="model")

    @own.get("/version", include_in_schema=False)
    async def show_version() -> JSONResponse:
        """`version` is vLLM's, as its own clients expect."""
        return JSONResponse({"version": vllm_version, "shoal": pruning.__version__})

    return own
