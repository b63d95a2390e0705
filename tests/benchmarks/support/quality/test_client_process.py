from __future__ import annotations

from benchmarks.support.federation_run import run_in_process
from benchmarks.support.quality.client_process import ClientProcess
from tests.support.tiny_federation import save_tiny_graph, tiny_config, write_texts


def test_clients_in_a_process_of_their_own_give_the_same_run(tmp_path, tiny_tokenizer):
    graph = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)
    folders = []
    for name in ("letters", "digits"):
        folders.append(tmp_path / "private" / name)
        write_texts(folders[-1], [name])
    config = tiny_config(graph, tmp_path / "apart", num_rounds=1)
    with ClientProcess() as clients:
        apart = run_in_process(config, ["a", "b"], folders, client_app=clients)
        assert clients.peak_bytes() > 50e6  # libraries alone
        assert clients.seconds > 0
    here = run_in_process(tiny_config(graph, tmp_path / "here", num_rounds=1), ["a", "b"], folders)
    assert apart.trajectory[1]["losses"] == here.trajectory[1]["losses"]
    assert apart.trajectory[1]["updates"] == here.trajectory[1]["updates"] > 0
