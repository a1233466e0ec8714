"""The presets' schedules."""

from dataclasses import replace

import pytest

from fused_preact.training.recipe import CIFAR, DIGITS, IMAGENET, learning_rate, preset_lr


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.01), (399, 0.01), (400, 0.1), (31_999, 0.1), (32_000, 0.01), (47_999, 0.01),
     (48_000, 0.001), (63_999, 0.001)],
)  # fmt: skip
def test_cifar_preset_is_the_papers(step, rate):
    """The rates of He et al. 2016 at each end of each phase; exact but for a division by 10."""
    total = round(CIFAR.epochs * (50_000 // CIFAR.batch_size))
    assert total == 64_000
    assert learning_rate(CIFAR, step, total) == pytest.approx(rate, rel=1e-12)


def test_cifar_preset_is_plain_sgd_of_the_paper():
    assert (CIFAR.batch_size, CIFAR.momentum, CIFAR.weight_decay) == (128, 0.9, 1e-4)


@pytest.mark.parametrize(("step", "rate"), [(0, 0.01), (40, 0.1), (3_200, 0.01), (4_800, 0.001)])
def test_schedule_scales_with_the_epochs(step, rate):
    """A tenth of the training has its phases at a tenth of the steps."""
    assert learning_rate(CIFAR, step, 6_400) == pytest.approx(rate, rel=1e-12)


def test_imagenet_preset_drops_each_thirty_epochs_and_grows_with_the_batch():
    recipe = replace(IMAGENET, lr=preset_lr(IMAGENET, "imagenet", 512))
    rates = [learning_rate(recipe, epoch, 90) for epoch in (0, 29, 30, 59, 60, 89)]
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002, 0.002], rel=1e-12)


def test_digits_preset_warms_up_and_falls_to_nothing():
    rates = [learning_rate(DIGITS, step, 1_000) for step in range(1_000)]
    assert rates[:20] == [DIGITS.lr / 10] * 20
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[-1] < 1e-5
