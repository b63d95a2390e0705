from __future__ import annotations

import tomllib

import pytest

from configs.errors import UserError
from configs.schema import RunConfig, load_run_config, run_config_defaults
from configs.values import read_config_file
from tests.support.paths import ROOT


def test_flower_app_config_equals_the_defaults():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    table = pyproject["tool"]["flwr"]["app"]["config"]
    assert table == run_config_defaults()
    # Flower compares the types of overrides with those of the table, and 0 == 0.0 in the line above.
    assert {key: type(value) for key, value in table.items()} == {
        key: type(value) for key, value in run_config_defaults().items()
    }


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
def test_every_configuration_file_is_valid(path):
    load_run_config(read_config_file(path))


def test_every_field_has_one_line_of_documentation():
    for name, field in RunConfig.model_fields.items():
        assert field.description and "\n" not in field.description and field.description.endswith("."), name


def test_keys_are_hyphenated_scalars():
    for key, value in run_config_defaults().items():
        assert "_" not in key and type(value) in (bool, int, float, str)
    assert RunConfig(num_clients=5).values()["num-clients"] == 5


def test_values_round_trip_and_the_configuration_is_frozen():
    config = load_run_config({"budgets": "8, 4,1", "num-clients": 3, "data": "wikimix;a b.txt ; "})
    assert config.client_budgets == (8, 4, 1)
    assert config.sources == ("wikimix", "a b.txt") and config.server_sources == ()
    assert load_run_config(config.values()) == config
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


def test_empty_budgets_fall_back_to_expert_budget():
    assert load_run_config({"num-clients": 3, "expert-budget": 4}).client_budgets == (4, 4, 4)
    assert load_run_config({}).client_budgets == (0, 0)


def test_lists_and_integers_are_taken_where_text_is_meant():
    config = load_run_config({"budgets": [16, 8], "data": ["wikimix:recipes", "a.txt"], "out": 2024})
    assert (config.budgets, config.sources, config.out) == ("16,8", ("wikimix:recipes", "a.txt"), "2024")
    assert load_run_config({"budgets": 8, "num-clients": 1}).client_budgets == (8,)


def test_integers_are_taken_for_floats():
    assert load_run_config({"density": 1, "learning-rate": 1}).density == 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num-round": 3}, "unknown configuration key 'num-round' (did you mean 'num-rounds'?)"),
        ({"rho_max": 3}, "did you mean 'rho-max'?"),
        ({"num-rounds": 0}, "expected num-rounds to be a value greater than or equal to 1, got 0"),
        ({"num-clients": 0}, "expected num-clients to be a value greater than or equal to 1, got 0"),
        ({"num-rounds": "3"}, "expected num-rounds to be a valid integer, got '3'"),
        ({"seed": True}, "expected seed to be a valid integer, got True"),
        ({"density": 0}, "expected density to be a value greater than 0, got 0"),
        ({"density": 1.5}, "expected density to be a value less than or equal to 1, got 1.5"),
        ({"density": float("nan")}, "expected density to be a finite number, got nan"),
        ({"overwrite": 1}, "expected overwrite to be a valid boolean, got 1"),
        ({"value-bits": 5}, "expected value-bits to be 16, 8, 4 or 2, got 5"),
        ({"walk": "breadth-first"}, "'best-first' or 'depth-first', got 'breadth-first'"),
        ({"usage-decay": 1.0}, "expected usage-decay to be a value less than 1, got 1.0"),
        ({"graph": {"a": 1}}, "expected graph to be a valid string"),
        ({"budgets": "8,x"}, "expected budgets to be whole numbers above 0 separated by ',', got '8,x'"),
        ({"budgets": "8,4,2"}, "num-clients is 2), got 3: '8,4,2'"),
        ({"budgets": "8,4", "expert-budget": 2}, "either budgets or expert-budget"),
        (
            {"budgets": "8,4", "ship-experts": 5},
            "expected ship-experts to be at most the smallest client budget 4",
        ),
        ({"expert-budget": 4, "experts-per-token": 5}, "expected experts-per-token to be at most"),
        ({"train": "heads"}, "expected train to be 'all', 'experts' or 'routing', got 'heads'"),
        ({"optimizer": "adam"}, "'adamw', 'adafactor' or 'sgd', got 'adam'"),
        ({"schedule": "step"}, "'constant', 'linear' or 'cosine', got 'step'"),
        ({"momentum": 1.0}, "expected momentum to be a value less than 1, got 1.0"),
        ({"accumulation-steps": 0}, "expected accumulation-steps to be a value greater than or equal to 1"),
        ({"early-stop-delta": -0.1}, "expected early-stop-delta to be a value greater than or equal to 0"),
        (
            {"num-rounds": 2, "local-steps": 5, "warmup-steps": 10},
            "expected warmup-steps to be below the run's 10 optimizer steps (num-rounds x local-steps), got 10",
        ),
        ({"train": "experts", "z-loss-weight": 0.1}, "expected train to be all or routing with"),
        ({"train": "experts", "load-balance-weight": 0.1}, "these losses train routers"),
        (
            {"loss-on": "answer"},
            "expected loss-on to be all or answers, got 'answer' (did you mean 'answers'?)",
        ),
        ({"block-size": 1}, "expected block-size to be at least 2, or 0 for the default, got 1"),
        ({"block-size": -1}, "expected block-size to be a value greater than or equal to 0, got -1"),
        ({"data": " ; "}, "expected data to name at least one source"),
        ({"partition": "domains"}, "did you mean 'domain'?"),
    ],
)
def test_bad_values_are_refused_in_one_line(values, message):
    with pytest.raises(UserError) as caught:
        load_run_config(values)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_budget_every_expert_is_held_and_many_may_be_shipped():
    assert load_run_config({"expert-budget": 0, "ship-experts": 64}).ship_experts == 64


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"weights": "nf4"}, "expected lora-rank above 0 with weights nf4"),
        ({"weights": "bf16"}, "expected lora-rank above 0 with weights bf16"),
        ({"low-rank": True, "upload-budget-mb": 1.0}, "expected low-rank without upload-budget-mb"),
        ({"low-rank": True, "selection": "sample"}, "expected low-rank without selection=sample"),
        ({"attention-lora": True}, "expected lora-rank above 0 with attention-lora"),
        ({"lora-rank": 8, "train": "routing"}, "expected train to be all or experts with lora-rank"),
        ({"memory-budget-mb": 900, "budgets": "8,4"}, "either budgets or memory-budget-mb"),
        ({"memory-budget-mb": 900, "expert-budget": 4}, "either expert-budget or memory-budget-mb"),
        ({"budgets": "8,0"}, "expected budgets to be whole numbers above 0"),
        ({"weights": "int8"}, "expected weights to be"),
    ],
)
def test_what_does_not_go_together_is_refused(values, words):
    with pytest.raises(UserError, match=words):
        load_run_config(values)


def test_lora_on_experts_and_attention_in_4_bits_goes_together():
    config = load_run_config(
        {"weights": "nf4", "lora-rank": 8, "attention-lora": True, "memory-budget-mb": 900}
    )
    assert (config.weights, config.lora_rank, config.lora_alpha, config.attention_lora) == (
        "nf4",
        8,
        16.0,
        True,
    )


def test_steps_of_a_run_are_those_of_all_rounds():
    config = load_run_config({"num-rounds": 3, "local-steps": 4, "warmup-steps": 11})
    assert (config.total_steps, config.warmup_steps) == (12, 11)


def test_conflicts_are_refused_at_construction():
    with pytest.raises(ValueError, match="budgets"):
        RunConfig(num_clients=3, budgets="1,2")
