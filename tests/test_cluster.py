"""A cluster gives the bytes of one machine, also when one of its workers is killed in the middle."""
import os, signal, subprocess, sys, threading, time

import numpy as np
import pytest

distributed = pytest.importorskip('distributed')
from memkit.cluster import cluster_address, describe_shards, map_shards, nearest_shards
from memkit.core import InputError, sha256_of
from memkit.database import build_database
from memkit.mesh import save_mesh
from memkit.retrieval import nearest


@pytest.fixture(scope='module')
def machines():
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster: yield cluster


def boxes(folder, n):
    for i in range(n):
        V = np.array([[x, y, z] for x in (0, 1.) for y in (0, 1 + i/7) for z in (0, 2 + i % 5)])
        F = np.array([[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]])
        save_mesh(folder/f'box{i:02}.off', V, F)
    (folder/'broken.off').write_text('OFF\nno mesh\n')


class SlowSize:
    "A distance whose description takes a while, so that there is a middle in which to kill."
    name, protocol = 'slow size', ''
    def describe(self, V, F):
        time.sleep(.05)
        return V.max(0) - V.min(0)


def test_a_killed_worker_costs_nothing(tmp_path, machines):
    boxes(tmp_path/'meshes', 30)
    alone = build_database(tmp_path/'meshes', tmp_path/'alone', SlowSize(), n_jobs=1)
    killed = []
    def kill():
        while not list(tmp_path.glob('shared/shards/*/index.json')): time.sleep(.02)
        with distributed.Client(machines.scheduler_address) as c: pids = c.run(os.getpid)
        os.kill(next(iter(pids.values())), signal.SIGKILL)
        killed.append(len(list(tmp_path.glob('shared/shards/*/index.json'))))
    hand = threading.Thread(target=kill)
    hand.start()
    shared = describe_shards(tmp_path/'meshes', tmp_path/'shared', SlowSize(), machines.scheduler_address, size=4)
    hand.join()
    assert killed[0] < 8, 'killed too late'
    assert (shared.array == alone.array).all() and shared.failures == alone.failures
    assert {p.name: sha256_of(p) for p in (tmp_path/'alone').iterdir()} == {p.name: sha256_of(p) for p in (tmp_path/'shared').iterdir()}


def test_nearest_on_a_cluster(tmp_path, machines, monkeypatch):
    rng = np.random.default_rng(0)
    class Stored:
        name = 'lfd'
        def describe(self, V, F): return np.random.default_rng(int(1000*V.max())).integers(0, 40, (10, 10, 47), dtype=np.uint8)
    boxes(tmp_path/'meshes', 25)
    db = build_database(tmp_path/'meshes', tmp_path/'db', Stored(), n_jobs=1)
    few = build_database({f'q{i}': tmp_path/'meshes'/f'box0{i}.off' for i in range(4)}, tmp_path/'few', Stored(), n_jobs=1)
    monkeypatch.setenv('MEMKIT_CLUSTER', machines.scheduler_address)
    for k in (1, 6):
        for a, b in zip(nearest_shards(few, db, tmp_path/'parts', k, size=4), nearest(few, db, k, device='cpu')): assert (a == b).all()
    times = {p: p.stat().st_mtime_ns for p in (tmp_path/'parts').iterdir()}
    nearest_shards(few, db, tmp_path/'parts', 6, size=4)
    assert times == {p: p.stat().st_mtime_ns for p in (tmp_path/'parts').iterdir()}, 'finished shards were done again'


def test_a_scheduler_file_and_its_absence(tmp_path):
    with pytest.raises(InputError, match='no such scheduler file'): cluster_address(tmp_path/'none.json')
    file = tmp_path/'scheduler.json'
    run = lambda *args: subprocess.Popen([sys.executable, '-m', *args], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    started = [run('distributed.cli.dask_scheduler', '--scheduler-file', str(file), '--no-dashboard', '--port', '0')]
    try:
        while not file.exists(): time.sleep(.05)
        started.append(run('distributed.cli.dask_worker', '--scheduler-file', str(file), '--nthreads', '1', '--no-dashboard', '--local-directory', str(tmp_path)))
        assert map_shards(np.linalg.norm, [np.ones(3), np.ones(2)], cluster_address(file)) == {}
    finally:
        for p in started[::-1]: p.terminate(); p.wait(30)
