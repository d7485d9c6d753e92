"""The recipes that come with the package, and how flags win over a recipe."""

import pytest

from pruning.budget import check, counts, resolved
from pruning.errors import RecipeError
from pruning.models.checkpoint import verify
from pruning.recipe import Recipe, limits
from pruning.recipes import ADAPTERS, EFFORTS, about, find, merged, read, shipped
from tests.conftest import run_prune_export as run

SHORT = ["--calibration-tokens", "256", "--sequence-length", "64"]


@pytest.mark.parametrize("name", shipped())
def test_every_recipe_can_be_carried_out_and_says_what_it_is_for(name):
    recipe = Recipe.model_validate(read(find(name)))
    check(recipe)
    assert counts(resolved(recipe, 8192), 30).attention + counts(resolved(recipe, 8192), 30).blocks > 0
    line = about(find(name))
    assert line.endswith(".") or line.endswith(":")
    assert 20 < len(line) <= 100
    assert len(set(name) & set("._/")) == 0


def test_efforts_make_windows_and_their_other_halves_adapters():
    for effort in EFFORTS:
        assert limits(Recipe.model_validate(read(find(effort))))
        assert not limits(Recipe.model_validate(read(find(effort + ADAPTERS))))


def test_quick_is_what_nothing_asks_for():
    quick = resolved(Recipe.model_validate(read(find("quick"))), 8192)
    assert quick == resolved(Recipe(), 8192)


def test_methods_name_their_source():
    for name, path in shipped().items():
        if not name.startswith(EFFORTS):
            assert "arXiv" in path.read_text()
            assert "Different: " in path.read_text()


@pytest.mark.parametrize(
    ("given", "left"),
    [
        (set(), {"attention", "ffn", "heal_minutes", "rank"}),
        ({"rank"}, {"attention", "ffn", "heal_minutes"}),
        ({"ffn"}, {"attention", "heal_minutes", "rank"}),
        ({"kv_budget"}, {"heal_minutes", "rank"}),
        ({"kv_memory"}, {"heal_minutes", "rank"}),
        ({"heal", "heal=none"}, {"attention", "ffn", "rank"}),
    ],
)
def test_flags_win_over_what_contradicts_them(given, left):
    keys = {"attention": 2, "ffn": 1, "heal_minutes": 3, "rank": 8}
    assert set(merged(keys, given)) == left


def test_list_and_print(monkeypatch, capsys):
    assert run(monkeypatch, "recipes") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(shipped())
    assert lines[0].startswith("quick ")
    assert run(monkeypatch, "recipes", "sleb") == 0
    assert capsys.readouterr().out == find("sleb").read_text()


def test_a_recipe_by_name_with_flags_that_win(monkeypatch, pico_directory, text, tmp_path):
    arguments = [pico_directory(), "--recipe", "shortgpt", "--calibration", text, *SHORT, "--score-tokens", "128"]
    assert run(monkeypatch, *arguments, "--output", tmp_path / "a") == 0
    assert set(verify(tmp_path / "a").importance) == {"cosine"}
    assert len(verify(tmp_path / "a").removed) == 4
    assert run(monkeypatch, *arguments, "--output", tmp_path / "b", "--kv-budget", "50%") == 0
    assert sorted(name.split(".")[0] for name in verify(tmp_path / "b").removed) == ["attention"] * 3


def test_effort_is_the_recipe_of_that_name(monkeypatch, pico_directory, text, tmp_path):
    arguments = [pico_directory(), "--effort", "balanced", "--calibration", text, *SHORT]
    assert run(monkeypatch, *arguments, "--output", tmp_path / "a", "--kv-budget", "60%", "--context", "128") == 0
    made = verify(tmp_path / "a")
    assert set(made.removed.values()) == {"window"}
    assert made.recipe["codes"] == read(find("balanced"))["codes"]
    assert made.recipe["samples"] == read(find("balanced"))["samples"]
    flags = ["--weight-budget", "90%", "--rank", "2", "--score-tokens", "128"]
    assert run(monkeypatch, *arguments, "--output", tmp_path / "b", *flags) == 0
    made = verify(tmp_path / "b")
    assert set(made.removed.values()) == {"low_rank"}
    assert made.recipe["search"] == read(find("balanced" + ADAPTERS))["search"]


def test_a_file_may_have_the_name_of_a_recipe(monkeypatch, tmp_path):
    (tmp_path / "best").write_text("attention: 2\n")
    monkeypatch.chdir(tmp_path)
    assert read(find("./best")) == {"attention": 2}
    assert read(find("best")) == read(shipped()["best"])
    with pytest.raises(RecipeError, match="did you mean best"):
        find("bets")


def test_values_that_a_manifest_leaves_open_say_nothing(tmp_path):
    (tmp_path / "recipe.yaml").write_text("ffn: null\nattention:\nrank: 8\n")
    assert read(tmp_path / "recipe.yaml") == {"rank": 8}
