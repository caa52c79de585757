"""The order in which layers run, with loops and without."""

from pgolf.model import ModelConfig
from pgolf.settings import load_settings


def test_layers_run_in_the_records_order(small_config):
    """#2135's log: encoder 0 1 2 3 4 5 3 4, decoder 5 3 4 5 6 7 8 9 10."""
    config = ModelConfig.of(load_settings({"PRESET": "record"}))
    visits = config.visits(looping=True)
    assert [visit.layer for visit in visits] == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5, 6, 7, 8, 9, 10]
    assert [visit.stores for visit in visits] == [True] * 8 + [False] * 9
    assert [visit.skip for visit in visits] == [None] * 8 + list(range(8)) + [None]
    assert [visit.layer for visit in config.visits(looping=False)] == list(range(11))
    assert sum(visit.skip is not None for visit in config.visits(looping=False)) == 5
    assert len(ModelConfig.of(load_settings({"PRESET": "recurrent8"})).visits(looping=True)) == 29
    # 35.9 and 53.2 million weights met a token, of which the records' utilisation is reckoned
    assert [round(config.weights_met(looping) / 1e6, 1) for looping in (False, True)] == [35.9, 53.2]
