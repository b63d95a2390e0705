from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from clients.state import local_graph as module
from clients.state.local_graph import NeedsRecipe, node_cache
from configs.errors import UserError
from configs.schema import load_run_config
from federated.protocol.messages import NEEDS_RECIPE, Request, read_request
from models.bootstrap import recipe_build
from models.bootstrap.recipe import graph_fingerprint, read_recipe, read_recipe_file, write_recipe
from models.checkpoints.load import load_graph
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID, Drop
from tests.support.tiny_federation import TinyGrid, all_equal, node_of, tiny_config, tiny_federation


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def base(tiny_llama_dir, tmp_path) -> Path:
    """The dense base alone, in a folder of the client's own."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))


@pytest.fixture
def config(tiny_graph_dir):
    return load_run_config({"graph": str(tiny_graph_dir)})


def request_of(graph: Path, **changes) -> Request:
    """A request that brings the recipe of ``graph``, with ``changes``."""
    recipe = read_recipe_file(str(graph))
    facts = {"base_fingerprint": graph_fingerprint(str(graph)), "graph_hash": "", "recipe": recipe}
    return Request(**{"server_round": 1, "version": 0, **facts, **changes})


def local_graph(config, node, request: Request) -> str:
    return module.local_graph(config, node_of(node), request)


def refusal(*args) -> str:
    with pytest.raises(UserError) as error:
        local_graph(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_node_s_cache_is_its_own_or_the_user_s(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "user"))
    assert node_cache(node_of({"cache-dir": "/x"})) == Path("/x")
    assert node_cache(node_of()) == node_cache(node_of({"cache-dir": ""})) == tmp_path / "user"


def test_a_graph_folder_counts_if_it_is_the_server_s(config, tiny_graph_dir, cache, tmp_path):
    request = request_of(tiny_graph_dir, recipe=b"")
    node = {"cache-dir": str(cache)}
    assert local_graph(config, node, request) == str(tiny_graph_dir)
    own = str(shutil.copytree(tiny_graph_dir, tmp_path / "own"))
    assert local_graph(config, node | {"graph": own, "base": "unread"}, request) == own
    other = request_of(tiny_graph_dir, recipe=b"", base_fingerprint="another")
    assert f"other weights in {own}" in refusal(config, node | {"graph": own}, other)


def test_the_graph_is_asked_for_built_once_and_found_again(config, base, tiny_graph_dir, cache, monkeypatch):
    node = {"cache-dir": str(cache), "base": str(base)}
    with pytest.raises(NeedsRecipe, match="got none"):
        local_graph(config, node, request_of(tiny_graph_dir, recipe=b""))
    built = local_graph(config, node, request_of(tiny_graph_dir))
    assert Path(built).parent == cache / "graphs"
    assert all_equal(load_graph(built), load_graph(str(tiny_graph_dir)))
    monkeypatch.setattr(recipe_build, "build_into", lambda *args: pytest.fail("built again"))
    shutil.rmtree(base)
    for changes in ({}, {"recipe": b""}):
        assert local_graph(config, node, request_of(tiny_graph_dir, **changes)) == built


def test_the_run_may_name_the_base_and_a_node_another(config, base, tiny_graph_dir, cache, tmp_path):
    run = config.model_copy(update={"base": str(base)})
    node, request = {"cache-dir": str(cache)}, request_of(tiny_graph_dir)
    assert Path(local_graph(run, node, request)).parent == cache / "graphs"
    assert local_graph(run, node | {"graph": str(tiny_graph_dir)}, request) == str(tiny_graph_dir)
    node = {"cache-dir": str(tmp_path / "fresh"), "base": str(tmp_path / "none")}
    assert str(tmp_path / "none") in refusal(run, node, request)


def test_another_base_is_refused_and_nothing_is_kept(config, base, tiny_graph_dir, cache):
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    node = {"cache-dir": str(cache), "base": str(base)}
    message = refusal(config, node, request_of(tiny_graph_dir))
    assert message.startswith("expected the dense base with fingerprint") and str(base) in message
    assert not [path for path in (cache / "graphs").iterdir() if path.is_dir()]


def test_without_room_for_the_graph_nothing_is_kept(config, base, tiny_graph_dir, cache, little_room):
    node = {"cache-dir": str(cache), "base": str(base)}
    assert "MiB free on the file system of" in refusal(config, node, request_of(tiny_graph_dir))
    assert not [path for path in (cache / "graphs").iterdir() if path.is_dir()]


def test_a_recipe_of_another_graph_is_refused_and_nothing_is_kept(config, base, tiny_graph_dir, cache):
    recipe = read_recipe(read_recipe_file(str(tiny_graph_dir)))
    routers = np.flip(recipe.routers, axis=1)
    other = write_recipe(type(recipe)(recipe.facts, recipe.neurons, routers, recipe.masks))
    node = {"cache-dir": str(cache), "base": str(base)}
    for data, reason in ((other, "changed since its bootstrap"), (b"garbage", "safetensors")):
        assert reason in refusal(config, node, request_of(tiny_graph_dir, recipe=data))
    assert not [path for path in (cache / "graphs").iterdir() if path.is_dir()]


@pytest.mark.parametrize("name", ["", "../../elsewhere", "/etc", "A" * 64, "0" * 63])
def test_a_request_cannot_name_a_place_on_the_disk(config, base, tiny_graph_dir, cache, name):
    node = {"cache-dir": str(cache), "base": str(base)}
    assert "SHA-256" in refusal(config, node, request_of(tiny_graph_dir, base_fingerprint=name))
    assert not cache.exists()


def test_a_built_graph_that_is_damaged_is_built_again(config, base, tiny_graph_dir, cache):
    node = {"cache-dir": str(cache), "base": str(base)}
    built = Path(local_graph(config, node, request_of(tiny_graph_dir)))
    weights = next(built.glob("model-00002*"))
    whole = weights.read_bytes()
    for broken in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-1], b"", None):
        weights.unlink()
        if broken is not None:
            weights.write_bytes(broken)
        with pytest.raises(NeedsRecipe):
            local_graph(config, node, request_of(tiny_graph_dir, recipe=b""))
        assert local_graph(config, node, request_of(tiny_graph_dir)) == str(built)
        assert weights.read_bytes() == whole


def test_what_a_killed_process_left_is_removed(config, base, tiny_graph_dir, cache):
    request = request_of(tiny_graph_dir)
    left = cache / "graphs" / f".{request.base_fingerprint}.abc.partial"
    left.mkdir(parents=True)
    (left / "model-00001-of-00003.safetensors").touch()
    built = local_graph(config, {"cache-dir": str(cache), "base": str(base)}, request)
    assert [path for path in (cache / "graphs").iterdir() if path.is_dir()] == [Path(built)]


def test_clients_of_one_machine_build_it_once(config, base, tiny_graph_dir, cache, monkeypatch):
    builds, build = [], recipe_build.build_into

    def slow(*args):
        builds.append(args)
        time.sleep(0.2)
        build(*args)

    monkeypatch.setattr(recipe_build, "build_into", slow)
    node, request, found = {"cache-dir": str(cache), "base": str(base)}, request_of(tiny_graph_dir), []
    threads = [
        threading.Thread(target=lambda: found.append(local_graph(config, node, request))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(builds) == 1 and len(found) == 4 and len(set(found)) == 1


def grid_of(config, cache: Path | None = None) -> TinyGrid:
    """A grid; with ``cache`` each client has a cache folder of its own in it."""
    grid = TinyGrid(config)
    for index, node in enumerate(grid.node_ids if cache else []):
        grid.contexts[node].node_config["cache-dir"] = str(cache / str(index))
    return grid


def run_tiny(config, cache: Path | None = None, before=lambda server_round, node: None):
    """Run a federation; ``before(round, node)`` is called ahead of every message."""
    grid = grid_of(config, cache)
    grid.before = before
    federation = tiny_federation(grid, config)
    federation.run()
    return grid, federation.global_model


def needs_recipe(sent) -> list[tuple[int, int]]:
    return [
        (server_round, node)
        for server_round, node, _, reply in sent
        if reply is not None and reply.has_error() and reply.error.code == NEEDS_RECIPE
    ]


def test_a_federation_of_clients_with_the_dense_base_alone_ends_as_one_with_graph_folders(
    tmp_path, tiny_graph_dir, base, cache
):
    plain_grid, plain = run_tiny(tiny_config(tiny_graph_dir, tmp_path / "plain", num_rounds=2))
    based = tiny_config(tiny_graph_dir, tmp_path / "based", num_rounds=2, base=str(base))
    grid, server = run_tiny(based, cache)
    assert all_equal(server.model, plain.model) and server.version == plain.version == 2
    assert needs_recipe(grid.sent) == [(1, 1), (1, 0)] and needs_recipe(plain_grid.sent) == []
    recipes = [read_request(message.content).recipe for _, _, message, _ in grid.sent]
    recipe = read_recipe_file(str(tiny_graph_dir))
    assert [data for data in recipes if data] == [recipe] * 2
    assert {path.parts[-3] for path in cache.glob("*/graphs/*") if path.is_dir()} == {"0", "1"}
    # A later run finds the graph that was built, and costs not a byte more than one with graph folders.
    for folder in cache.glob("*/run-*"):
        shutil.rmtree(folder)
    again = tiny_config(tiny_graph_dir, tmp_path / "again", num_rounds=2, base=str(base))
    later_grid, later = run_tiny(again, cache)
    assert needs_recipe(later_grid.sent) == [] and all_equal(later.model, plain.model)
    assert len(later_grid.sent) == len(plain_grid.sent)
    # Extra bytes are those of the recipe, of the requests sent in vain, and of what asked for it.
    extra = [grid.bytes_down - later_grid.bytes_down, grid.bytes_up - later_grid.bytes_up]
    assert 2 * len(recipe) < extra[0] < 2 * (len(recipe) + 4000) and 0 < extra[1] < 2 * 1000


def test_a_wrong_base_ends_the_run_with_one_line(tmp_path, tiny_graph_dir, base, cache):
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    config = tiny_config(tiny_graph_dir, tmp_path / "run", base=str(base))
    with pytest.raises(UserError, match="expected the dense base with fingerprint") as error:
        run_tiny(config, cache)
    assert "\n" not in str(error.value) and str(base) in str(error.value)


def test_a_run_that_is_continued_with_another_base_ends_with_one_line(tmp_path, tiny_graph_dir, base, cache):
    config = tiny_config(tiny_graph_dir, tmp_path / "run", base=str(base), num_rounds=2)
    grid = grid_of(config, cache)
    grid.faults = {(node, "2"): Drop() for node in (0, 1)}
    with pytest.raises(RuntimeError, match="no client gave a usable update"):
        run_federation(grid, config, run_id=RUN_ID)
    shutil.rmtree(cache)
    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    continued = config.model_copy(update={"resume": True})
    with pytest.raises(
        UserError, match="expected the dense base with fingerprint .* the server's graph was made"
    ):
        run_federation(grid_of(continued, cache), continued, run_id=RUN_ID)


def test_a_server_without_a_recipe_says_how_to_mend_it(tmp_path, tiny_graph_dir, base, cache):
    graph = Path(shutil.copytree(tiny_graph_dir, tmp_path / "graph"))
    (graph / "recipe.safetensors").unlink()
    config = tiny_config(graph, tmp_path / "run", base=str(base))
    with pytest.raises(UserError, match="expected a recipe .* got none; run `fedgraft bootstrap`"):
        run_tiny(config, cache)


def test_a_client_that_lost_its_graph_but_not_its_copy_gets_recipe_and_steps(
    tmp_path, tiny_graph_dir, base, cache
):
    config = tiny_config(tiny_graph_dir, tmp_path / "run", num_rounds=2, base=str(base), rho_max=0)
    _, plain = run_tiny(tiny_config(tiny_graph_dir, tmp_path / "plain", num_rounds=2, rho_max=0))
    lost = []

    def lose(server_round: int, node: int) -> None:
        if (server_round, node) == (2, 0) and not lost:
            shutil.rmtree(cache / "0" / "graphs")
            lost.append(node)

    grid, server = run_tiny(config, cache, lose)
    assert all_equal(server.model, plain.model)
    assert needs_recipe(grid.sent) == [(1, 1), (1, 0), (2, 0)]
