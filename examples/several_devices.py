"""One sample on several processes: each evaluates its share of the rows of every round.

    torchrun --standalone --nproc-per-node 2 examples/several_devices.py

It needs ``piadm[diffusers]``, for the shipped network, and takes about half a minute on two CPU cores.  Without
torchrun it is one process that does all.  With GPUs, one for each process, it uses them.
"""

import os

import torch
import torch.distributed as dist

import piadm

torch.set_num_threads(1)  # the processes share the cores
device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
launched = dist.is_torchelastic_launched()
if launched:
    dist.init_process_group("gloo")

denoiser = piadm.load("fashion", device=device)
workers = piadm.Ranks(split="rows") if launched else None
solution = piadm.sample(denoiser, (1, 1, 28, 28), method="ode", steps=1000, tol=1e-2, seed=0, workers=workers)

# Every rank has the result; one of them is enough to tell it.
if not launched or dist.get_rank() == 0:
    stats = solution.stats
    print(f"{dist.get_world_size() if launched else 1} processes: {solution.status[0].name}, {stats.wall_time:.1f} s")
    print(f"{stats.rounds} rounds of {stats.evaluations / stats.rounds:.0f} rows, shared out among them")
if launched:
    dist.destroy_process_group()
