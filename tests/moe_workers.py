"""Ranks of real gloo processes for the expert-parallel tests; they answer through a queue."""

from __future__ import annotations

import multiprocessing
import os
import queue
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ch15_helpers import load_model
from ch15_helpers.kernels.moe_route import route_topk
from ch15_helpers.moe.balancing import balance_greedy, balance_hierarchical
from ch15_helpers.moe.expert_parallel import ExpertParallelConfig, shard_experts
from ch15_helpers.moe.experts import ExpertWeights, SharedExpert
from ch15_helpers.moe.model_overlap import forward_dense_overlapped
from ch15_helpers.moe.overlap import (
    OverlapLayer,
    forward_micro_batches,
    forward_overlapped,
    forward_sequential,
    time_versions,
)
from ch15_helpers.moe.placement import ExpertPlacement
from ch15_helpers.moe.rebalance import keep_in_place, moved_bytes, plan_moves, rebalance
from ch15_helpers.moe.routing import SyntheticRouter, drop_over_capacity, expert_capacity
from ch15_helpers.moe.topology import NodeGroups, make_expert_parallel, make_node_groups
from ch15_helpers.moe.traffic import count_links
from ch15_helpers.moe.wire import dequantise_rows, quantise_rows


def run_ranks(world_size: int, job: str, folder: Path) -> dict[int, Any]:
    """Run a job of :data:`JOBS` on every rank, and return what each of them found."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    init = f"file://{folder / 'meet'}"
    ranks = [
        context.Process(target=main, args=(rank, world_size, init, job, results))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    answers: dict[int, Any] = {}
    try:
        while len(answers) < world_size:
            rank, answer = results.get(timeout=120)
            answers[rank] = answer
            if isinstance(answer, str):
                break
    except queue.Empty:
        answers[-1] = f"no answer from {set(range(world_size)) - set(answers)}"
    finally:
        for process in ranks:
            process.join(0.1 if any(isinstance(a, str) for a in answers.values()) else 10)
            if process.is_alive():
                process.kill()
    errors = {rank: a for rank, a in answers.items() if isinstance(a, str)}
    assert not errors, errors
    return answers


def main(rank: int, world_size: int, init: str, job: str, results: Any) -> None:
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=init, rank=rank, world_size=world_size)
        results.put((rank, JOBS[job](rank, world_size)))
        dist.barrier()
    except BaseException as error:
        results.put((rank, f"{type(error).__name__}: {error}"))
    results.close()
    results.join_thread()
    sys.stdout.flush()
    os._exit(0)


class Case:
    """One layer, one batch on each rank, known to every rank; and its float64 reference."""

    def __init__(self, rank: int, world: int, seed: int, **options: Any) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rank, self.world = rank, world
        self.num_experts = options.pop("num_experts", 7 + seed % 6)
        self.top_k = options.pop("top_k", 1 + seed % 4)
        hidden, inner = options.pop("dims", (40 + 8 * (seed % 3), 24))
        sizes = torch.randint(0, 40, (world,), generator=generator).tolist()
        self.sizes = options.pop("sizes", sizes)
        one_expert, ties = options.pop("one_expert", None), options.pop("ties", False)
        self.placement = options.pop("placement", None) or self.placed(options.pop("spare", 0))
        self.dtype = options.pop("dtype", torch.float32)
        self.config = ExpertParallelConfig(**options)

        def normal(*shape: int) -> torch.Tensor:
            values = torch.randn(*shape, generator=generator, dtype=torch.float64)
            return values.to(self.dtype)

        self.all = ExpertWeights(
            normal(self.num_experts, 2 * inner, hidden) / hidden**0.5,
            normal(self.num_experts, hidden, inner),
        )
        router = SyntheticRouter(self.num_experts, self.top_k, skew=0.8, seed=seed)
        self.batches = []
        for size in self.sizes:
            weights, experts = router.route(size)
            if one_expert is not None:
                experts = torch.full_like(experts, one_expert)
            if ties:  # two levels of logits: most experts tie with others
                logits = torch.randint(0, 2, (size, self.num_experts), generator=generator)
                weights, experts = route_topk(logits.float(), self.top_k, True)
            self.batches.append((normal(size, hidden), weights, experts))

    def placed(self, spare: int) -> ExpertPlacement:
        """Even, or with spare slots full of replicas of the low experts."""
        if not spare:
            return ExpertPlacement.even(self.num_experts, self.world)
        loads = [1.0 / (1 + expert) for expert in range(self.num_experts)]
        size = -(-self.num_experts // self.world) + spare
        return balance_hierarchical(loads, self.world, size, self.world)

    def layer(self, groups: NodeGroups | None = None) -> Any:
        own = self.all.of_rank(self.placement, self.rank)
        return make_expert_parallel(
            own, self.placement, self.top_k, self.config, node_groups=groups
        )

    def expected(self) -> torch.Tensor:
        """Every expert on every token of this rank in float64, then the chosen ones."""
        return dense_float64(self.all, *self.batches[self.rank])


def dense_float64(
    all_experts: ExpertWeights, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    wide = torch.einsum("th,eih->tei", x.double(), all_experts.gate_up.double())
    gate, up = wide.chunk(2, -1)
    y = torch.einsum("tei,ehi->teh", gate * gate.sigmoid() * up, all_experts.down.double())
    num_experts = y.shape[1]
    chosen = torch.zeros(x.shape[0], num_experts + 1, dtype=torch.float64)
    keys = torch.where((ids >= 0) & (ids < num_experts), ids, num_experts)
    chosen.scatter_add_(1, keys, weights.double())
    return torch.einsum("te,teh->th", chosen[:, :-1], y)


def error_of(out: torch.Tensor, expected: torch.Tensor) -> float:
    if not out.numel():
        return 0.0 if out.shape == expected.shape else float("inf")
    return float((out.double() - expected).norm() / expected.norm().clamp(min=1e-12))


def random_cases(rank: int, world: int) -> list[dict[str, Any]]:
    """Random shapes over every way of dispatching: relative errors and bytes on links."""
    found = []
    groups = {n: make_node_groups(n) for n in (1, 2, world) if world % n == 0}
    modes: list[dict[str, Any]] = [{}, {"deduplicate": False}, {"spare": 1}]
    modes += [{"ranks_per_node": n} for n in groups]
    modes += [{"ranks_per_node": 2, "spare": 2, "nearest_replica": True}] if 2 in groups else []
    modes += [{"ranks_per_node": n, "deduplicate": False} for n in groups]
    modes += [{"max_tokens": 40}, {"max_tokens": 40, "spare": 1, "sizes": [0] * (world - 1) + [9]}]
    modes += [{"max_tokens": 40, "ranks_per_node": n} for n in groups]
    modes += [{"sizes": [0] * (world - 1) + [9]}, {"sizes": [0] * world}]
    modes += [{"one_expert": 3, "top_k": 1}, {"one_expert": 3, "top_k": 1, "ranks_per_node": 1}]
    modes += [{"num_experts": world, "top_k": world}, {"num_experts": 2 * world - 1, "top_k": 2}]
    modes += [{"ties": True, "top_k": 3}, {"ties": True, "ranks_per_node": 1, "top_k": 3}]
    modes += [{"num_experts": 9 * world, "sizes": [1] * world, "ranks_per_node": n} for n in groups]
    modes += [{"one_expert": 0, "top_k": 1, "ranks_per_node": n, "spare": 1} for n in groups]
    for seed, mode in enumerate(modes * 2):
        case = Case(rank, world, seed, **mode)
        layer = case.layer(groups.get(case.config.ranks_per_node))
        out = layer(*case.batches[rank])
        counted = count_links(
            [experts for _, _, experts in case.batches], case.placement, case.config,
            case.all.hidden_size, torch.float32, case.top_k,
        )  # fmt: skip
        mine = {link: count for link, count in counted.items() if link[1] == rank}
        found.append(
            {
                "mode": f"{mode} seed {seed}",
                "error": error_of(out, case.expected()),
                "links": layer.link_bytes == mine,
                "bytes": sum(mine.values()),
            }
        )
    return found


def special_cases(rank: int, world: int) -> dict[str, Any]:
    """FP8, capacity, NaN, overlap: everything that is not plain equality of a random case."""
    groups = make_node_groups(2 if world % 2 == 0 else 1)
    found: dict[str, Any] = {}
    for name, options in {
        "fp8": {"fp8_dispatch": True},
        "fp8 nodes": {"fp8_dispatch": True, "ranks_per_node": 2},
        "fp8 pairs": {"fp8_dispatch": True, "deduplicate": False},
    }.items():
        case = Case(rank, world, 5, dims=(136, 40), sizes=[20 + r for r in range(world)], **options)
        outs = case.layer(groups)(*case.batches[rank])
        x, weights, experts = case.batches[rank]
        rounded = dequantise_rows(*quantise_rows(x), 128, torch.float32)
        expected = dense_float64(case.all, rounded, weights, experts)
        found[name] = error_of(outs, expected), error_of(outs, case.expected())
    case = Case(
        rank, world, 8, fp8_dispatch=True, combine_dtype=torch.bfloat16, dtype=torch.bfloat16
    )
    none = Case(rank, world, 5, sizes=[0] * (world - 1) + [3], fp8_dispatch=True, ranks_per_node=2)
    found["fp8 none"] = error_of(none.layer(groups)(*none.batches[rank]), none.expected())
    found["bf16"] = error_of(case.layer()(*case.batches[rank]), case.expected())
    ways: list[dict[str, Any]] = [{}, {"ranks_per_node": 2}, {"deduplicate": False}]
    found["capacity"] = [capacity_case(rank, world, groups, **way) for way in ways]
    found["nan"] = nan_case(rank, world, groups)
    found["overlap"] = overlap_cases(rank, world, groups)
    found["rebalance"] = rebalance_case(rank, world, groups)
    found["model"] = model_case(rank, world)
    return found


def capacity_case(
    rank: int, world: int, groups: NodeGroups, **options: Any
) -> tuple[float, int, int, bool]:
    """Error against the dense reference without the dropped pairs; dropped, expected, links."""
    sizes = [30 + r for r in range(world)]
    case = Case(rank, world, 6, capacity_factor=0.8, sizes=sizes, **options)
    layer = case.layer(groups)
    x, weights, experts = case.batches[rank]
    capacity = expert_capacity(len(x), case.top_k, case.num_experts, 0.8)
    kept = drop_over_capacity(experts, case.num_experts, capacity)
    out = layer(x, weights, experts)
    counted = count_links(
        [ids for _, _, ids in case.batches], case.placement, case.config,
        case.all.hidden_size, torch.float32, case.top_k,
    )  # fmt: skip
    mine = {link: count for link, count in counted.items() if link[1] == rank}
    expected = dense_float64(case.all, x, weights, kept)
    dropped = int((kept < 0).sum())
    return error_of(out, expected), int(layer.dropped), dropped, layer.link_bytes == mine


def nan_case(rank: int, world: int, groups: NodeGroups) -> bool:
    """Rank 0's token 1 is not a number: nothing else changes, anywhere."""
    clean_elsewhere = True
    for options in (
        {},
        {"fp8_dispatch": True},
        {"ranks_per_node": 2},
        {"deduplicate": False},
        {"max_tokens": 15},
    ):
        case = Case(rank, world, 7, sizes=[12] * world, **options)
        layer = case.layer(groups)
        x, weights, experts = case.batches[rank]
        clean = layer(x, weights, experts)
        if rank == 0:
            x = x.clone()
            x[1, 3] = float("nan")
        out = layer(x, weights, experts)
        others = torch.arange(12) != (1 if rank == 0 else -1)
        clean_elsewhere &= torch.equal(out[others], clean[others])
        clean_elsewhere &= rank != 0 or bool(out[1].isnan().all())
    return clean_elsewhere


def overlap_cases(rank: int, world: int, groups: NodeGroups) -> list[tuple[str, float]]:
    """Largest difference to the sequential version, and the versions' times are of all ranks."""
    found = []
    for options in ({}, {"ranks_per_node": 2}):
        case = Case(rank, world, 9, sizes=[25 + 3 * r for r in range(world - 1)] + [0], **options)
        layer = case.layer(groups)
        hidden = case.all.hidden_size
        generator = torch.Generator().manual_seed(2)
        shared = SharedExpert(
            torch.randn(48, hidden, generator=generator) / hidden**0.5,
            torch.randn(hidden, 24, generator=generator),
        )
        x, weights, experts = case.batches[rank]
        expected = forward_sequential(layer, x, weights, experts, shared)
        found.append(("sequential", error_of(expected - shared(x), case.expected())))
        for chunks in (1, 2, 3):
            out = forward_overlapped(layer, x, weights, experts, shared, chunks)
            found.append((f"{options} {chunks}", error_of(out, expected.double())))
        router = torch.randn(case.num_experts, hidden, generator=generator)

        def before(h: torch.Tensor, router: torch.Tensor = router, k: int = case.top_k) -> Any:
            return h, h, *route_topk(h @ router.T, k, True)

        layers = [OverlapLayer(before, layer, shared), OverlapLayer(before, layer)]
        (alone,) = forward_micro_batches(layers, [x])
        for overlap in (True, False):
            out = torch.cat(forward_micro_batches(layers, x.tensor_split(2), overlap=overlap))
            found.append((f"{options} two {overlap}", error_of(out, alone.double())))
        times = time_versions({"a": partial(layer, *case.batches[rank])}, x.device, iterations=2)
        everybody: list[Any] = [None] * world
        dist.all_gather_object(everybody, times)
        found.append(("times", 0.0 if all(t == times for t in everybody) else 1.0))
    return found


def rebalance_case(rank: int, world: int, groups: NodeGroups) -> list[tuple[float, bool]]:
    """Outputs after weights have moved, and whether the bytes are those that were planned."""
    found = []
    for options in ({}, {"ranks_per_node": 2, "nearest_replica": True}):
        case = Case(rank, world, 11, spare=1, num_experts=9, **options)
        layer = case.layer(groups)
        for seed in range(3):
            loads = torch.rand(9, generator=torch.Generator().manual_seed(seed)).pow(3).tolist()
            old, node = layer.placement, case.config.ranks_per_node
            new = balance_greedy(loads, world, old.slots_per_rank)
            new = keep_in_place(old, new, node)
            planned = moved_bytes(
                plan_moves(old, new, node), old.slots_per_rank, case.all.bytes_per_expert
            )
            sent = rebalance(layer, new)
            right = sent == {link: n for link, n in planned.items() if link[0] == rank}
            out = layer(*case.batches[rank])
            found.append((error_of(out, case.expected()), right and bool(planned)))
    return found


def model_case(rank: int, world: int) -> tuple[float, float]:
    """A whole model with its experts on many ranks, then in micro-batches, against one rank."""
    model = load_model("random:TINY_MOE", device="cpu", dtype=torch.float32)
    ids = torch.arange(3 + 5 * rank).view(1, -1) * 7 % 512
    with torch.inference_mode():
        expected = model.forward_dense(ids)
        config = ExpertParallelConfig(ranks_per_node=2 if world % 2 == 0 else None)
        shard_experts(model, ExpertPlacement.even(8, world), config)
        whole = error_of(model.forward_dense(ids), expected.double())
        rows = ids.repeat(4, 1)
        outs = forward_dense_overlapped(model, [rows[:1], rows[1:]])
        halves = error_of(torch.cat(outs), expected.expand(4, -1, -1).double())
        return whole, halves


def everything(rank: int, world: int) -> dict[str, Any]:
    return {"random": random_cases(rank, world), **special_cases(rank, world)}


JOBS = {"everything": everything}
