"""Shoal's own routes, without an engine."""

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

import pruning
from server.app import adopt
from server.inventory import Inventory
from server.routes import router

KEPT = {"attention": "kept", "ffn": "kept"}


@pytest.fixture
def client():
    async def cards():
        names = ("llama-pruned", "team/adapter")
        return {"object": "list", "data": [{"id": name, "root": "/srv/models/llama-pruned"} for name in names]}

    app = FastAPI()

    @app.get("/v1/models")
    def stock_models():
        return {}

    inventory = Inventory((KEPT,), 2, 2, 100, 100, 200, 0, 0, 0)
    adopt(app, router(None, inventory, cards, None, "0.32.0").routes)
    return TestClient(app)


@pytest.mark.parametrize("name", ["llama-pruned", "team/adapter", "team%2Fadapter"])
def test_one_model_is_its_entry_in_the_list(client, name):
    listed = {card["id"]: card for card in client.get("/v1/models").json()["data"]}
    assert client.get(f"/v1/models/{name}").json() == listed[name.replace("%2F", "/")]


def test_an_unknown_model_is_404(client):
    answer = client.get("/v1/models/other")
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "The model `other` does not exist.", "type": "not_found_error", "param": "model",
        "code": "model_not_found",
    }  # fmt: skip


def test_no_path_on_disk_is_shown(client):
    assert "/srv" not in client.get("/v1/models").text
    assert {card["root"] for card in client.get("/v1/models").json()["data"]} == {"llama-pruned", "team/adapter"}


def test_versions_and_the_title(client):
    assert client.get("/version").json() == {"version": "0.32.0", "shoal": pruning.__version__}
    info = client.get("/openapi.json").json()["info"]
    assert (info["title"], info["version"]) == ("Shoal", pruning.__version__)
