"""`make size` in words."""

from __future__ import annotations

from scripts import show_image


def test_the_sum_is_told_by_its_parts() -> None:
    sums = {
        "image_bytes": 1_700_000_000,
        "base_bytes": 152_600_000,
        "engines_and_tokenizer_bytes": 12_740_000,
        "added_bytes": 1_534_660_000,
    }
    assert show_image.summary(sums) == (
        "The image has 1.7 GB: 152.6 MB of base, 12.7 MB of engines and tokenizer, "
        "1.5 GB of packages, launcher, configs and passport."
    )
