"""Ranks as read from the variables that torchrun and srun set."""

import socket

import pytest

from normexp.errors import UserError
from normexp.training.process_group import Process, Ranks, first_node, this_process

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
}


def test_torchrun() -> None:
    assert this_process(TORCHRUN) == Process(3, 4, 1, "node1", 29500)
    assert this_process({**SRUN, **TORCHRUN}) == this_process(TORCHRUN)
    assert not this_process(TORCHRUN).is_main
    with pytest.raises(UserError, match="MASTER_ADDR, MASTER_PORT is not set"):
        this_process({k: v for k, v in TORCHRUN.items() if not k.startswith("MASTER")})


def test_srun() -> None:
    found = this_process(SRUN)
    assert (found.rank, found.size, found.local_rank, found.address) == (3, 4, 1, "gpu07")
    assert 15000 <= found.port < 30000
    # one place to meet for all tasks of a step, another for every other step and job
    assert this_process({**SRUN, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}).port == found.port
    others = [{"SLURM_STEP_ID": "3"}, {"SLURM_JOB_ID": "1235"}]
    assert len({found.port, *(this_process({**SRUN, **other}).port for other in others)}) == 3
    chosen = this_process({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    assert (chosen.address, chosen.port) == ("10.0.0.1", 4000)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # in a batch script
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # a step of one task in an allocation of four
        {**SRUN, "RANK": "0", "WORLD_SIZE": "1"},  # torchrun of one process in each task
        {"WORLD_SIZE": "4"},  # of some other program
    ],
    ids=["nothing", "allocation", "step of one task", "torchrun within srun", "foreign"],
)
def test_one_process_is_alone(environment) -> None:
    assert this_process(environment) == Process()


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("gpu[9]-ib,a", "gpu9-ib"),
        ("rack[0-1]n[02,07],x", "rack0n02"),
        ("login.cluster,n[1-2]", "login.cluster"),
    ],
)
def test_first_node_of_a_list(nodes, first) -> None:
    assert first_node(nodes) == first


def test_taken_port_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"rank 0 of 2 cannot meet .*:{port} .*MASTER_PORT"):
            Ranks(Process(0, 2, 0, "127.0.0.1", port))


def test_gpu_belongs_to_one_rank() -> None:
    """Ranks 0 and 2 name the same GPU in the store, which here a single process fills."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = Ranks(Process(0, 3, 0, "127.0.0.1", port))
    for rank, device in ((1, "GPU 1 of a, uuid1"), (2, "GPU 0 of a, uuid0")):
        ranks.store.set(f"device {rank}", device)
    with pytest.raises(UserError, match=r"ranks 0 and 2 have the same GPU \(GPU 0 of a, uuid0\)"):
        ranks.refuse_shared_devices("GPU 0 of a, uuid0")
    ranks.refuse_shared_devices("GPU 0 of b, uuid2")
    ranks._end_noticed.set()  # for the thread that watches
