"""Models of random weights: whole ones, and ones whose layers repeat each other, so that a smaller disk holds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import reports, synthetic
from scripts.weights.hugging_face import REPEATED, read_hf_model
from scripts.weights.shape import LlamaShape

SHAPE = LlamaShape(16, 24, 5, 4, 2, 2100)


def numbers(model: Any, name: str) -> np.ndarray[Any, Any]:
    return np.concatenate([np.array(block) for block in model.blocks(name)])


def test_layers_repeat_the_first_ones_in_turn(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    synthetic.write(folder, SHAPE, seed=1, own_layers=2)
    model = read_hf_model(folder)
    assert set(model.tensors) == set(SHAPE.hf_tensors())
    name = "model.layers.{}.mlp.up_proj.weight"
    own = [numbers(model, name.format(layer)) for layer in range(SHAPE.n_layers)]
    for layer, found in enumerate(own):
        assert np.array_equal(found, own[layer % 2])
    assert not np.array_equal(own[0], own[1])


def test_without_repeats_every_layer_has_numbers_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    synthetic.write(folder, SHAPE, seed=1)
    assert not (folder / REPEATED).exists()
    model = read_hf_model(folder)
    assert not np.array_equal(
        numbers(model, "model.layers.1.mlp.up_proj.weight"), numbers(model, "model.layers.3.mlp.up_proj.weight")
    )


@pytest.mark.parametrize("content", ['["x"]', "{", '{"model.layers.1.mlp.up_proj.weight": "nowhere"}'])
def test_a_damaged_list_of_repeats_is_named(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "model"
    synthetic.write(folder, SHAPE, seed=1, own_layers=2)
    (folder / REPEATED).write_text(content)
    with pytest.raises(reports.Problem) as problem:
        read_hf_model(folder)
    assert REPEATED in problem.value.report()


def test_the_shapes_are_those_that_plan_knows() -> None:
    from scripts import plan

    known = json.loads(plan.SHAPES.read_text())
    for name, shape in synthetic.SHAPES.items():
        assert (known[name]["dim"], known[name]["n_layers"], known[name].get("n_kv_heads", known[name]["n_heads"])) == (
            shape.hidden_size,
            shape.n_layers,
            shape.n_kv_heads,
        )
