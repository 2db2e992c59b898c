"""All methods over one log: what is left out is said, and what a network says is of the exposures that count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from attribution.analysis import analyse
from attribution.coding import MAX_UNIFORM, code
from attribution.insights import attribute
from attribution.scoring import auc_of, logits_of, rows_of
from kaleidoscope.errors import InputError, LogError
from kaleidoscope.log import Log
from kaleidoscope.ranker import Ranker
from kaleidoscope.vocabulary import Level, Method
from tests.attribution.logs import liking
from tests.kaleidoscope.commands.test_attribute import trained_on


def explored(n: int, epsilon: float, certain: int = 0) -> Log:
    """Of six variants a model shows the first, but for a share `epsilon` drawn of all; to the first `certain` users it
    could have shown nothing else."""
    log, rng = liking(n, 30, 0.0)[0], np.random.default_rng(1)
    variant = np.where(rng.random(n) < epsilon, rng.integers(0, 6, n), 0)
    variant[:certain] = 0
    propensity = epsilon / 6 + (1 - epsilon) * (variant == 0)
    propensity[:certain] = 1.0
    return replace(
        log, variant=variant, propensity=propensity, schema=log.schema.model_copy(update={"propensity": "p"})
    )


def test_weights_that_are_clipped_are_said_of_main_effects_too() -> None:
    found = analyse(explored(60_000, 0.005), name="log", dependent=False)
    (check,) = (check for check in found.checks if check.code == "weights_clipped")
    assert check.level == Level.WARNING
    assert (
        f"Of main effects, 0.43 % of the exposures would count more than {MAX_UNIFORM:g} times the mean"
        in check.message
    )
    assert " % of all that exposures stand for is lost by it." in check.message
    assert found.attribution.diagnostics.clipped_uniform > 0.004
    plain = analyse(explored(20_000, 0.5), name="log", dependent=False)
    assert not [check for check in plain.checks if check.code in ("weights_clipped", "certain_exposures")]


def test_exposures_that_were_certain_are_left_out_and_counted() -> None:
    found = analyse(explored(20_000, 0.5, certain=50), name="log", dependent=False)
    (check,) = (check for check in found.checks if check.code == "certain_exposures")
    assert check.message.startswith("50 exposures are left out: their users could have seen nothing else")
    assert found.attribution.diagnostics.certain == 50


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Ranker:
    return Ranker.load(trained_on(liking(20_000, 10, 0.7)[0], tmp_path_factory.mktemp("exported") / "model"))


@pytest.mark.parametrize(
    "partly",
    [
        lambda log: replace(log, weight=np.where(np.arange(len(log)) % 3, 1.0, 0.0)),  # rows that count nothing
        lambda log: explored(len(log), 0.5, certain=50),
    ],
)
def test_the_networks_words_are_of_the_exposures_that_count(partly: Callable[[Log], Log], ranker: Ranker) -> None:
    log = partly(liking(20_000, 31, 0.7)[0])
    coded = code(log, dependent=False)
    assert coded.rows is not None and len(coded) < len(log)
    rows, logits = logits_of(ranker, rows_of(log, coded), seed=0)
    women, loud = coded.codes[0][rows] == 0, np.isin(coded.variant[rows], (2, 3))
    assert logits[women & loud].mean() > logits[~women & loud].mean() + 0.3
    found = analyse(log, name="log", ranker=ranker, dependent=False)
    assert found.network is not None and found.network_ebm is not None and Method.NETWORK not in found.not_done
    assert (found.network_ebm.fidelity.r2 or 0) > 0.9


def test_another_log_is_refused() -> None:
    coded = code(liking(500, 1, 0.0)[0], dependent=False)
    with pytest.raises(InputError, match="of the same log"):
        rows_of(liking(400, 1, 0.0)[0], coded)


def test_the_auc_needs_clicks_and_exposures_without_one() -> None:
    coded = code(liking(500, 1, 0.0)[0], dependent=False)
    assert auc_of(coded, coded.reward) == 1
    assert auc_of(coded, np.zeros(500)) == 0.5
    for same in (0.0, 1.0):
        assert auc_of(replace(coded, reward=np.full(500, same)), np.zeros(500)) is None


@pytest.mark.parametrize("given", [None, "f"])
def test_user_fields_that_are_the_same_everywhere_tell_nobody_apart(given: str | None) -> None:
    log = liking(2_000, 1, 0.0)[0]
    columns = {name: pa.array([given] * 2_000, pa.string()).dictionary_encode() for name in log.columns}
    found = analyse(replace(log, columns=columns), name="log", dependent=False)
    assert set(found.not_done) == {"preference", "ebm", "grid", "contributions", "network"}
    assert found.not_done["ebm"].startswith("No user field tells users apart") and found.attribution.main_effects


def test_a_method_that_was_not_done_says_why() -> None:
    found = analyse(liking(2_000, 1, 0.0)[0], name="log", dependent=False)
    assert set(found.by_method) == set(Method) - {Method.NETWORK}
    assert found.not_done == {"network": "No model was given."}


@pytest.mark.parametrize(("units", "said"), [(1, "1 unit in all"), (9, "9 units in all")])
def test_a_log_of_a_few_units_is_refused(units: int, said: str) -> None:
    log = replace(liking(3_000, 4, 0.5)[0], unit=np.arange(3_000) % units)
    with pytest.raises(LogError, match=f"log.parquet: {said} 3,000 exposures; 10 are needed"):
        analyse(log, name="log", dependent=False)
    with pytest.raises(LogError, match="10 are needed"):
        attribute(log, dependent=False)


def test_an_id_that_many_share_is_said() -> None:
    log = liking(3_000, 4, 0.5)[0]
    shared = replace(log, unit=np.maximum(np.arange(3_000) - 600, 0))
    (check,) = (one for one in analyse(shared, name="log", dependent=False).checks if one.code == "unit_dominates")
    assert check.level == Level.WARNING and "One unit has 20 % of the exposures" in check.message
    assert "unit_dominates" not in [one.code for one in analyse(log, name="log", dependent=False).checks]
