"""The tables as data: beside the paper's, and only fields that a recipe has."""

import dataclasses

import pytest
from ablations.run import difference, row_recipes
from ablations.tables import RELEASE, TABLES

from cosa_hf.training.config import TrainingConfig

RECIPES = TrainingConfig.directory


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_table_can_be_asked_of_every_weakly_supervised_recipe(name, path):
    recipe = TrainingConfig.from_yaml(
        path, background_threshold=None
    )  # a fixed pair of thresholds and DT exclude each other
    recipes = row_recipes(TABLES[name], recipe)
    assert list(recipes) == list(TABLES[name].rows)


@pytest.mark.parametrize("name", [name for name in TABLES if name != "5"])
def test_no_two_rows_are_the_same_for_the_papers_recipe(name):
    recipes = list(row_recipes(TABLES[name], TrainingConfig()).values())
    assert all(one != other for index, one in enumerate(recipes) for other in recipes[:index])


def test_table_5_has_the_papers_optimum_among_its_values():
    recipes = row_recipes(TABLES["5"], TrainingConfig())
    same = [row for row, recipe in recipes.items() if recipe == recipes["recipe"]]
    assert same == ["recipe", "(a) s2c 0.05", "(b) c2s 0.1", "(c) epsilon 1", "(d) m 0.9994"]


def test_table_3_ends_at_the_paper_and_starts_without_a_component():
    cumulative, without = row_recipes(TABLES["3a"], TrainingConfig()), row_recipes(TABLES["3b"], TrainingConfig())
    assert cumulative["GC SA RAW CSC DT"] == without["CoSA"] == TrainingConfig()
    assert cumulative["GC SA RAW CSC"] == without["without DT"] == TrainingConfig(dynamic_threshold=False)
    assert difference(cumulative["base"], TrainingConfig()) == {
        "guidance": ("none", "spl"),
        "swapping_assignments": (False, True),
        "reliability_weighting": (False, True),
        "separation_weight": (0.0, 0.1),
        "dynamic_threshold": (False, True),
    }
    for row in list(without)[1:]:
        assert len(difference(without["CoSA"], without[row])) == 1


def test_components_that_a_recipe_leaves_out_are_on_where_the_table_says_so():
    recipe = TrainingConfig(dynamic_threshold=False)
    assert row_recipes(TABLES["3b"], recipe)["CoSA"].dynamic_threshold
    assert row_recipes(TABLES["3b"], recipe)["without DT"] == recipe


def test_release_row_is_the_release_recipe_at_another_schedule():
    release = TrainingConfig.from_yaml(RECIPES / "voc-release.yaml")
    paper = TrainingConfig.from_yaml(RECIPES / "voc-vit-b.yaml")
    schedule = {name: getattr(release, name) for name in ("max_steps", "learning_rate", "output_dir")}
    assert difference(dataclasses.replace(paper, **RELEASE, **schedule), release) == {}
