"""The shipped Triton kernels of a Hopper on the emulation, from their PTX."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import torch

from siglip_kernels.backends.triton import configs
from siglip_kernels.backends.triton.configs import Variant
from tests.hopper import emulator
from tests.hopper.emulator import Settings
from tests.hopper.problems import Kind, Outcome, first_failure, mismatch, random_shape, random_task, tensors_of
from tests.hopper.triton_driver import compile_for, emulated_driver

Mutate = Callable[[str], str]  # changes PTX
LARGEST = 300  # rows and columns of a problem


def shipped() -> list[Variant]:
    """Every shipped variant for half precision."""
    return [v for v in configs.shipped() if v.arch == "sm_90" and v.dtype is not torch.float32]


def unchanged(ptx: str) -> str:
    return ptx


def random_blocks(variant: Variant, seeds: range, mutate: Mutate = unchanged) -> Iterator[Outcome]:
    """Run the variant on random blocks."""
    from siglip_kernels.backends.triton import launch

    with emulated_driver() as driver:
        compile_for(driver, variant, mutate)
        for seed in seeds:
            choose = random.Random(seed)
            shape = random_shape(choose, LARGEST)
            task = random_task(choose, kind_of(variant), *shape)
            tiles = configs.max_tiles(*shape[:2], variant.config)
            task = task._replace(workspace=torch.full((3 * tiles,), torch.nan))
            if shape[2] % 16 == 0 and not (variant.stats or variant.by_image):  # else the launcher allocates by itself
                emulator.allow(*tensors_of(task))
            settings = Settings.of_seed(seed, strict_mbarriers=False)  # Triton publishes them by bar.sync alone
            emulator.configure(settings)
            try:
                launch.launch_block(variant, task)
                wrong = mismatch(task)
            except RuntimeError as error:
                wrong = str(error)
            finally:
                emulator.forget()
            yield f"{variant}: seed {seed}, {shape}, {settings}", wrong


def first_failure_of(variant: Variant, seeds: range, mutate: Mutate = unchanged) -> str | None:
    return first_failure(random_blocks(variant, seeds, mutate))


def ptx_of(variant: Variant) -> str:
    from siglip_kernels.backends.triton import launch

    with emulated_driver():
        return launch.compile_variant(variant).asm["ptx"]


def kind_of(variant: Variant) -> Kind:
    """What a launch of the variant is asked for."""
    return Kind(
        variant.dtype,
        variant.labels,
        variant.has_weights,
        None if variant.masses == "none" else variant.masses,
        "dz" if variant.write_dz else "loss" if variant.loss_only else "sums",
        variant.stats,
        variant.balance,
        variant.teacher,
        variant.by_image,
    )
