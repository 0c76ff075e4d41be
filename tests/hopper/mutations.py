"""Changes that make the CUDA kernel wrong: each must be noticed, by a broken rule or by a value."""

from __future__ import annotations

import re
from typing import NamedTuple


class Mutation(NamedTuple):
    """Replace ``right``, which must be in the file once, by ``wrong``."""

    file: str
    right: str
    wrong: str

    def __call__(self, texts: dict[str, str]) -> None:
        found = texts[self.file].count(self.right)
        assert found == 1, f"{self.file} has {self.right!r} {found} times"
        texts[self.file] = texts[self.file].replace(self.right, self.wrong)

    def __str__(self) -> str:
        return f"{self.file}: {' '.join(self.right.split())} -> {' '.join(self.wrong.split()) or 'nothing'}"


def _of(file: str, *changes: tuple[str, str]) -> list[Mutation]:
    return [Mutation(file, *change) for change in changes]


FIRST_SYNC = "if (stores) tma_store_wait_group_read();\n      named_barrier_sync(1 + consumer, kWarpgroupThreads);"
LAST_SYNC = "fence_proxy_async();\n      named_barrier_sync(1 + consumer, kWarpgroupThreads);"
# Of what both the source and the PTX have.
KERNEL = [
    *_of(
        "kernel.cuh",
        # The pipeline's waits and arrivals.
        ("mbarrier_wait(&shared.empty_barrier[state.stage], state.producer_phase());", ""),
        ("mbarrier_wait(&shared.full_barrier[state.stage], state.phase);", ""),
        ("mbarrier_wait(&shared.ordered_barrier[consumer], ordered_barrier_phase(consumer, iteration));", ""),
        (
            "  if (threadIdx.x % 32 == 0) mbarrier_arrive(&shared.ordered_barrier[next_consumer(consumer)]);",
            "",
        ),
        ("  consumer_release(previous_empty_barrier);\n}", "}"),
        (
            "    if (previous_empty_barrier) consumer_release(previous_empty_barrier);\n"
            "    previous_empty_barrier = &shared.empty_barrier[state.stage];",
            "    consumer_release(&shared.empty_barrier[state.stage]);",
        ),
        (
            "previous_empty_barrier = &shared.empty_barrier[state.stage];",
            "previous_empty_barrier = &shared.empty_barrier[0];",
        ),
        (
            "  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty_barrier);",
            "  if (threadIdx.x % 128 == 0) mbarrier_arrive(empty_barrier);",
        ),
        (
            "  if (threadIdx.x % 32 == 0) mbarrier_arrive(empty_barrier);",
            "  if (threadIdx.x % 16 == 0) mbarrier_arrive(empty_barrier);",
        ),
        ("sizeof shared.x[0] + sizeof shared.y[0]);", "sizeof shared.x[0]);"),
        ("mbarrier_init(&shared.full_barrier[stage], 1);", "mbarrier_init(&shared.full_barrier[stage], 2);"),
        ("&shared.empty_barrier[stage], kWarpsPerWarpgroup);", "&shared.empty_barrier[stage], 1);"),
        ("mbarrier_init(&barrier, kWarpsPerWarpgroup);", "mbarrier_init(&barrier, 1);"),
        ("    fence_mbarrier_init();\n", ""),
        ("  __syncthreads();\n", ""),
        ("state.advance((kNumConsumers - 1) * k_tiles);", "state.advance(k_tiles - 1);"),
        ("state.advance(consumer * k_tiles);", ""),
        # The products.
        ("    wgmma_fence();\n", ""),
        ("wgmma_wait_group<1>();", ""),
        ("wgmma_wait_group<1>();", "wgmma_wait_group<2>();"),
        ("  wgmma_wait_group<0>();\n", ""),
        ("    wgmma_commit_group();\n", ""),
        ("kWgmmaBytes = 64 * kBlockK * 2;", "kWgmmaBytes = 32 * kBlockK * 2;"),
        ("accumulate = k_tile > 0 || k > 0;", "accumulate = k > 0;"),
        ("accumulate = k_tile > 0 || k > 0;", "accumulate = true;"),
        ("&x_map, k_tile * kBlockK, tile.m", "&x_map, k_tile * kBlockK, tile.n"),
        # The store of dz.
        ("if (stores) tma_store_wait_group_read();", ""),
        (FIRST_SYNC, "if (stores) tma_store_wait_group_read();"),
        (LAST_SYNC, "named_barrier_sync(1 + consumer, kWarpgroupThreads);"),
        (LAST_SYNC, "fence_proxy_async();"),
        (LAST_SYNC, LAST_SYNC.replace("1 + consumer", "1")),
        ("        tma_store_commit_group();\n", ""),
        ("if (kOutput == Output::kDz && stores) tma_store_wait_group();", ""),
        ("bool stores = threadIdx.x % kWarpgroupThreads == 0;", "bool stores = threadIdx.x % kWarpgroupThreads < 2;"),
        # Registers and shared memory.
        ("    setmaxnreg_dec<kProducerRegisters>();\n", ""),
        ("kConsumerRegisters = 232;\nstatic_assert(", "kConsumerRegisters = 240;\nstatic_assert(true || "),
        (
            "(reinterpret_cast<uintptr_t>(smem) + 1023) & ~uintptr_t(1023)",
            "(reinterpret_cast<uintptr_t>(smem) + 127) & ~uintptr_t(127)",
        ),
    ),
    *_of(
        "pipeline.h",
        ("return phase ^ 1;", "return phase;"),
        ("(iteration & 1) ^ (consumer == 0)", "iteration & 1"),
        ("phase ^= stage / kNumStages & 1;", ""),
    ),
    *_of(
        "layout.h",
        ("uint64_t(1024 >> 4) << 32", "uint64_t(512 >> 4) << 32"),
        ("uint64_t(1) << 62", "uint64_t(2) << 62"),
        ("^ row % 8", "^ row % 4"),
        ("(smem_address & 0x3ffff) >> 4", "(smem_address & 0xffff) >> 4"),
    ),
    Mutation("tile_scheduler.h", "in_group % group_rows", "in_group % kGroupM"),
    *_of(
        "epilogue.cuh",
        ("if (row + 16 <= params_.rows && ", "if ("),
        ("-16 < diagonal", "0 < diagonal"),
        ("void flush() { sums_.flush(); }", "void flush() {}"),
        ("    sums_ = Sums();\n", ""),
        ("      stats_ = LogitStats();\n", ""),
        ("weighted & ~positive);", "weighted);"),
        (
            "reduce(stats_.least[k], stats + 4 * stride, Least());",
            "reduce(stats_.least[k], stats + 4 * stride, Largest());",
        ),
        ("if (!kLossOnly && any_positive) negate_positives(dz, positive);", ""),
        ("diagonal <= -kBlockM || diagonal >= kBlockN;", "true;"),
        ("is_plain_ = row + kBlockM <= params_.rows && ", "is_plain_ = "),
        ("is_plain_ && __all_sync(~0u, !may_match && all_low(a))", "is_plain_ && __all_sync(~0u, all_low(a))"),
        (
            "is_plain_ && __all_sync(~0u, !may_match && all_low(a))",
            "is_plain_ && __any_sync(~0u, !may_match && all_low(a))",
        ),
    ),
    Mutation("sigmoid_loss.h", "kLow = 2.5f;", "kLow = 50.0f;"),
    *_of(
        "general_pairs.cuh",
        ("matches[2] | matches[3];", "matches[2];"),
        ("rows_.in_bounds[r] && columns_.in_bounds[c]", "columns_.in_bounds[c]"),
        (" && !is_ignored", ""),
        ("same_id && !on_diagonal;", "same_id;"),
        ("rows_.weights[thread_row(i)] * columns_.weights", "columns_.weights"),
        ("rows_.masses[thread_row(i)] + ", ""),
        ("label = !is_positive ? 0.0f : ", "label = "),
        ("kept * (1 - label) + smoothing * label;", "kept * (1 - label);"),
        ("    toward *= params_.positive_weight;\n", ""),
        (
            "    toward *= params_.positive_weight;\n",
            "    toward *= params_.positive_weight, away *= params_.positive_weight;\n",
        ),
        ("if (params_.teacher) add_teacher(i, toward, away);", ""),
        ("if (params_.teacher) add_teacher(i, toward, away);", "if (params_.teacher) add_teacher(i, away, toward);"),
        ("toward = fmaf(kept, toward, ", "toward = fmaf(weight, toward, "),
        ("row * params_.teacher_stride + column", "row * params_.cols + column"),
        ("*params_.teacher_scale, *params_.teacher_bias)", "*params_.teacher_scale, 0.0f)"),
        ("row < params_.rows && column < params_.cols;", "true;"),
        ("counts = counted >> i & 1 ? factor : 0.0f", "counts = factor"),
        ("return mask & counted;", "return mask;"),
        ("return i / 4 * 2 + i % 2;", "return i / 4 * 2;"),
        ("columns_.load(k, column + accumulator_column(lane_, k / 2 * 4 + k % 2)", "columns_.load(k, column + k % 2"),
        ("text_ids[column + accumulator_column(lane_, k / 2 * 4 + k % 2)]", "text_ids[column + k % 2]"),
    ),
    *_of(
        "kernel.cuh",
        ("slice / kSlicesPerWgmma * 64", "0"),
        ("slices[s - 1][i] = slices[s][i];", "slices[s - 1][i] = slices[s - 1][i];"),
        ("      epilogue.flush();\n", ""),
        ("<< slice * kPlainChunks;", "<< slice;"),
    ),
]
# Of ptx.cuh, which only the PTX has.
PTX = _of(
    "ptx.cuh",
    ('asm volatile("fence.proxy.async.shared::cta;" ::: "memory");', ""),
    ('asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");', ""),
    ('"@!done bra again;\\n"', '""'),
    ('asm volatile("wgmma.fence.sync.aligned;" ::: "memory");', ""),
    ('"wgmma.wait_group.sync.aligned %0;" ::"n"(kPending)', '"wgmma.wait_group.sync.aligned %0;" ::"n"(kPending + 1)'),
    ('"cp.async.bulk.wait_group.read 0;"', '"cp.async.bulk.wait_group.read 1;"'),
    ("setp.ne.b32 accumulate", "setp.eq.b32 accumulate"),
    ("[%0, {%2, %3}], [%1];", "[%0, {%3, %2}], [%1];"),
    ('{%1, %2, %3, %4};" ::"r"(address)', '{%2, %1, %3, %4};" ::"r"(address)'),
    ("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;", "mbarrier.arrive.shared::cta.b64 _, [%0];"),
    ('"}, %64, %65, accumulate', '"}, %65, %64, accumulate'),
    ('"bar.sync %0, %1;"', '"bar.sync 1, %1;"'),
    ('"cvt.rn.bf16x2.f32 %0, %1, %2;"', '"cvt.rn.bf16x2.f32 %0, %2, %1;"'),
)


class PtxMutation(NamedTuple):
    """Replace what matches ``pattern`` in PTX: every match, or the one numbered ``only``."""

    pattern: str
    wrong: str
    only: int | None = None

    def __call__(self, ptx: str) -> str:
        matches = list(re.finditer(self.pattern, ptx))
        assert matches, f"the PTX has no {self.pattern!r}"
        chosen = matches if self.only is None else [matches[self.only]]
        for match in reversed(chosen):
            ptx = ptx[: match.start()] + match.expand(self.wrong) + ptx[match.end() :]
        return ptx

    def __str__(self) -> str:
        return f"{self.pattern} -> {self.wrong or 'nothing'}" + ("" if self.only is None else f" at {self.only}")


# Of Triton's kernel with ids and weights.
TRITON = [
    PtxMutation(r"fence\.proxy\.async\.shared::cta;", ""),
    PtxMutation(r"cp\.async\.bulk\.wait_group\.read\s+0;", ""),
    PtxMutation(r"cp\.async\.bulk\.commit_group;", ""),
    PtxMutation(r"wgmma\.wait_group\.sync\.aligned 1;", "wgmma.wait_group.sync.aligned 2;"),
    PtxMutation(r"wgmma\.wait_group\.sync\.aligned 0;", ""),
    PtxMutation(r"wgmma\.fence\.sync\.aligned;", ""),
    PtxMutation(r"wgmma\.commit_group\.sync\.aligned;", ""),
    PtxMutation(r"@!complete bra\.uni waitLoop;", ""),
    PtxMutation(r"mbarrier\.try_wait\.parity.*;", "setp.eq.b32 complete, 0, 0;"),
    PtxMutation(r"(expect_tx.*), \d+;", r"\1, 1024;"),
    PtxMutation(r"(mbarrier\.init.*), 1;", r"\1, 2;"),
    PtxMutation(r"(stmatrix.*), \{(%r\d+), (%r\d+)", r"\1, {\3, \2"),
    PtxMutation(r"(shfl\.sync\.bfly\.b32.*), 16,", r"\1, 8,"),
    PtxMutation(r"(setp\.eq)\.b64", r"setp.ne.b64"),
    PtxMutation(r"0f3FB8AA3B", "0f3FB8AA00"),
    PtxMutation(r"4611686293305294850", "4611686293305294852"),
    PtxMutation(r"rsqrt\.approx\.ftz\.f32", "rcp.approx.ftz.f32", 0),
]
# Of its kernel with a teacher, whose products move through shared memory: a sigmoid, and two barriers.
TAUGHT = [
    PtxMutation(r"rsqrt\.approx\.ftz\.f32", "rcp.approx.ftz.f32", 0),
    PtxMutation(r"bar\.sync\s+0;", "", -1),
    PtxMutation(r"bar\.sync\s+0;", "", -4),
]
# The barriers that can go, one by one, because others order the same: around the first loads, at the beginning of an
# iteration, where the mbarrier orders already, and between the loads of x and y.
REDUNDANT_BARRIERS = (0, 1, 2, 3, 4, 5, 7)
