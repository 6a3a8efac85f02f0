import dataclasses
import json

import jax
import numpy as np
import pytest

import jaxvq
from experiments import two_moons


@pytest.mark.parametrize("arguments", [[], ["--layerwise"]])
def test_smoke_run_writes_what_it_found(arguments, tmp_path, capsys):
    config = two_moons.parse(["--smoke", "--out", str(tmp_path), *arguments])
    found = two_moons.main(config)
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(found))
    assert (tmp_path / f"two_moons{'_layerwise' * bool(arguments)}.png").read_bytes().startswith(b"\x89PNG")
    rows = found["rows"]
    assert rows[two_moons.SHARED]["distinct"][0] <= (28 if arguments else 24)
    assert rows[two_moons.SHARED]["nbytes"] < rows[two_moons.FREE]["nbytes"] == rows[two_moons.FLOAT]["nbytes"]
    assert "Two moons" in capsys.readouterr().out


def test_a_study_starts_every_way_from_the_same_network(tmp_path):
    config = dataclasses.replace(two_moons.parse(["--smoke", "--out", str(tmp_path)]), epochs=1)
    before, after = two_moons.study(config)
    again = two_moons.train(two_moons.begin(config, 0), config, 0)
    assert before[0].losses == again.losses
    assert {name: len(runs) for name, runs in after.items()} == dict.fromkeys(two_moons.COLOURS, 1)


def test_shared_values_stay_shared_and_codes_stay(tmp_path):
    config = dataclasses.replace(two_moons.parse(["--smoke", "--out", str(tmp_path)]), epochs=3)
    params = two_moons.begin(config, 0)
    small = jaxvq.quantize_params(params, config.spec, key=jax.random.key(1))
    shared = two_moons.train(small, config, seed=0)
    free = two_moons.train(jaxvq.dequantize_params(small), config, seed=0)
    assert shared.distinct[-1] == two_moons.count_distinct(small) < free.distinct[-1]
    for name in ("Dense_0", "Dense_1", "Dense_2"):
        before, after = small[name]["kernel"], shared.params[name]["kernel"]
        np.testing.assert_array_equal(before.codes.words, after.codes.words)
    assert free.losses[-1] < free.losses[0]
