"""Runs side by side: workers that die or are left, and public training made once by whoever comes first."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_compare import inode, write

from privimage_fast.cli import main
from privimage_fast.compare import load_comparison, run_comparison
from privimage_fast.compare.shared import SharedTraining
from privimage_fast.compare.workers import Workers
from privimage_fast.pipeline import Run
from privimage_fast.stages.folder import RunError
from privimage_fast.stages.interrupt import interrupts_held


def work(task: tuple[str, Any]) -> Any:
    what, value = task
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit":
        os._exit(3)
    if what == "sleep":
        time.sleep(value)
    if what == "held":
        end = time.monotonic() + value
        with interrupts_held("…"):
            while time.monotonic() < end:
                time.sleep(0.01)
    if what == "pid":
        return os.getpid()
    if what == "threads":
        return os.getpid(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["TQDM_DISABLE"]
    return value


def workers(jobs: int) -> Workers[Any, Any]:
    return Workers(work, jobs=jobs, died=lambda task, why: (task[0], why))


def test_a_worker_that_dies_costs_one_task() -> None:
    found = list(workers(1).results([("echo", 1), ("kill", None), ("echo", 2), ("exit", None)]))
    assert found[0] == 1 and found[2] == 2
    assert found[1][0] == "kill" and "runs out of memory: try fewer jobs" in found[1][1]
    assert found[3] == ("exit", "its process ended with status 3")
    assert not multiprocessing.active_children()


def test_workers_share_the_threads_and_leave_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    try:
        found = list(workers(3).results([("threads", None)] * 2))  # one job more than there is to do
    finally:
        torch.set_num_threads(before)
    assert len({pid for pid, *_ in found}) == 2 and {tuple(rest) for _, *rest in found} == {(2, "2", "1")}
    assert os.environ["OMP_NUM_THREADS"] == "7" and "TQDM_DISABLE" not in os.environ


def test_workers_finish_what_is_held_and_all_at_once() -> None:
    """Told to end by the system and by their parent: neither stops what is charged, nor waits for the other."""
    results = workers(2).results([("echo", 1), ("held", 1.5), ("held", 1.5)])
    assert next(results) == 1
    time.sleep(0.5)
    begun = time.monotonic()
    for child in multiprocessing.active_children():
        os.kill(child.pid or 0, signal.SIGTERM)
    results.close()
    assert 0.3 < time.monotonic() - begun and not multiprocessing.active_children()


def test_workers_that_are_left_end() -> None:
    """As an interruption leaves them."""
    results = workers(2).results([("echo", 1), ("sleep", 600)])
    assert next(results) == 1
    results.close()
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_a_comparison_of_two_jobs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, variants=["pdp-diffusion", "dpdm", "random"], seeds=[0, 1])
    assert main(["compare", "--config", str(path), "--jobs", "2"]) == 0
    assert "pdp-diffusion" in capsys.readouterr().out
    runs = [f"{v}_epsilon=5_seed={s}" for v in ("pdp-diffusion", "dpdm", "random") for s in (0, 1)]
    assert sorted(p.name for p in (tmp_path / "out" / "runs").iterdir()) == sorted(runs)
    assert len({inode(tmp_path, run, "classifier") for run in runs}) == 1  # made once, by whoever came first
    assert inode(tmp_path, runs[0], "pretrain") == inode(tmp_path, runs[1], "pretrain")
    assert len({inode(tmp_path, run, "finetune") for run in runs}) == len(runs)
    assert {o.state for o in run_comparison(load_comparison(path), jobs=2)} == {"kept"}


PARENT = """
import sys
from test_compare_workers import work, workers
if __name__ == "__main__":
    for result in workers(2).results([("pid", None), ("sleep", 600), ("sleep", 600)]):
        print(result, flush=True)
"""


def test_workers_end_with_their_parent_however_it_ends(tmp_path: Path) -> None:
    """Left alone they would go on charging, and hold what they have locked."""
    (tmp_path / "parent.py").write_text(PARENT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, env=environment, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    parent.kill()
    parent.wait(30)
    deadline = time.monotonic() + 30
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_who_comes_second_waits_for_the_first(tmp_path: Path) -> None:
    """Two on one entry: one trains, the other finds what it left. What is there already is not waited for."""
    cells = load_comparison(write(tmp_path, variants=["dpdm"], seeds=[0, 1, 2])).cells
    shared, order = SharedTraining(tmp_path / "shared"), []

    def pretrain(cell: Any, hold: float) -> None:
        run = Run(cell.config)
        with run.opened(resume=True):
            run.select()
            with shared.pretraining(run) as found:
                order.append(found)
                time.sleep(hold)
                run.pretrain()
                order.append("done")

    threads = [threading.Thread(target=pretrain, args=(cell, 1.0)) for cell in cells[:2]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == [False, "done", True, "done"]
    waiting = threading.Thread(target=pretrain, args=(cells[2], 3.0))
    waiting.start()
    while len(order) < 5:
        time.sleep(0.01)
    run = Run(cells[0].config)
    with run.opened(resume=True):
        shared.labels(run)
        with shared.pretraining(run) as found:
            assert found is False  # its own is there
    assert len(order) == 5 and waiting.is_alive()
    waiting.join()


def test_queries_and_evaluations_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is made of public images is locked, and only while it is made."""
    (cell,) = load_comparison(write(tmp_path, variants=["privimage"], seeds=[0])).cells
    locked = []

    def unlocked(stage: str) -> None:
        for path in (tmp_path / "out" / "shared").glob(".*.lock"):
            with open(path) as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    locked.append((stage, path.name))

    for stage in ("query", "finetune", "evaluate"):
        original = getattr(Run, stage)
        monkeypatch.setattr(Run, stage, lambda self, stage=stage, original=original: (unlocked(stage), original(self))[1])
    assert [o.state for o in run_comparison(load_comparison(tmp_path / "grid.yaml"))] == ["done"]
    assert not locked and (tmp_path / "out" / "shared").is_dir() and cell.variant == "privimage"


def test_jobs_that_cannot_be_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, variants=["dpdm", "random"])
    assert main(["compare", "--config", str(path), "--jobs", "0"]) == 2
    assert "--jobs must be ≥ 1, found 0" in capsys.readouterr().err
    monkeypatch.setattr("privimage_fast.compare.runner.device_of", lambda name: "cuda")
    with pytest.raises(RunError, match=r"2 jobs on one GPU .* set finetune.memory_budget_mib"):
        run_comparison(load_comparison(path), jobs=2)
