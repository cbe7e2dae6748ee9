"""
schedule.py: rows become events, at the steps and in the order written out here by hand. A row that can't run is refused
by name. The configs hold the published schedules.
"""
import os
import re

import pytest
from conftest import REPO, default_settings

from configurator import configure
from parts.errors import UserError
from schedule import describe, learning_rate_at, state_at, timeline

FOLLOW_UPS = ("remove_ln_fast", "remove_ln_medium", "remove_ln_large", "remove_ln_xl")


def sites_of(n_layer):
    """The names of the sites of a model of so many layers."""
    return [f"h.{layer}.{kind}" for layer in range(n_layer) for kind in ("ln_1qk", "ln_1v", "ln_2")] + ["ln_f"]


def read_configs(*names):
    """The settings of train.py after config/NAME.py of each name, in order."""
    paths = [os.path.join(REPO, "config", f"{name}.py") for name in names]
    return configure(default_settings(), paths, "", configs=True)


@pytest.mark.parametrize("rows, n_layer, max_iters, events", [
    ([], 4, 10, []),  # the control
    # single sites
    ([("h.5.ln_2", 700, None), ("h.0.ln_1qk", 7, None), ("h.11.ln_1v", 0.5, None)], 12, 800,
     [(7, "ln_1qk", 0), (400, "ln_1v", 11), (700, "ln_2", 5)]),
    # events of one step keep the schedule's order
    ([("bos", 6, None), ("ln_f", 5, None), ("h.1.ln_1v", 5, None), ("ln_2", 5, 0), ("eot", 5, None), ("ln_1qk", 4, 1)],
     2, 10, [(4, "ln_1qk", 0), (5, "ln_f", None), (5, "ln_1v", 1), (5, "ln_2", 0), (5, "ln_2", 1), (5, "eot", None),
             (5, "ln_1qk", 1), (6, "bos", None)]),
    # a fraction of the run is the first step
    ([("ln_f", 0.35, None), ("bos", 0.0, None), ("ln_2", 0.25, 3)], 3, 200,
     [(0, "bos", None), (50, "ln_2", 0), (53, "ln_2", 1), (56, "ln_2", 2), (70, "ln_f", None)]),
    # a pair spreads the layers: from step 20 to 60 a layer every 40 / 6 steps, rounded down
    ([("ln_2", (0.1, 0.3), None)], 6, 200,
     [(20, "ln_2", 0), (26, "ln_2", 1), (33, "ln_2", 2), (40, "ln_2", 3), (46, "ln_2", 4), (53, "ln_2", 5)]),
    ([("ln_2", (10, 40), None)], 3, 200, [(10, "ln_2", 0), (20, "ln_2", 1), (30, "ln_2", 2)]),
    ([("ln_2", (10, 10), None)], 2, 200, [(10, "ln_2", 0), (10, "ln_2", 1)]),
])
def test_rows_give_these_events(rows, n_layer, max_iters, events):
    assert timeline(rows, n_layer, max_iters) == events


# with a row that removes all ln_1qk, of a model of 4 layers, in a run of 100 steps
@pytest.mark.parametrize("rows", [
    ["bos", 5, ("ln_2", 1), ("ln_2", 1, 2, "up")],  # no row: "bos" has three letters, as a row has three columns
    [("ln_3", 5, 1), ("h.4.ln_2", 5, None), ("h.-1.ln_2", 5, None), ("h.0.ln_f", 5, None)],  # no site of the model
    [("ln_2", -1, 2), ("bos", True, None), ("ln_2", "5", 2), ("ln_f", None, None)],  # no step
    [("ln_2", 1.5, 2), ("ln_f", float("nan"), None)],
    [("ln_2", (0.3, 0.1), None), ("ln_2", (0.1, 1), None), ("ln_2", (0.5, 1.5), None)],  # no pair of steps
    [("ln_2", (0.1, 0.2, 0.3), None), ("ln_2", (0.1, 0.3), 2), ("ln_f", (0.1, 0.3), None)],
    [("ln_2", 1, None), ("ln_2", 1, -1), ("ln_2", 1, 0.5)],  # no steps between layers
    [("ln_f", 1, 2), ("h.2.ln_2", 1, 2)],
    [("ln_2", 98, 1), ("bos", 100, None), ("ln_f", 1.0, None)],  # beyond the run
    [("ln_1qk", 50, 1), ("h.3.ln_1qk", 50, None)],  # twice
])
def test_a_row_that_can_not_run_is_refused(rows):
    for row in rows:
        with pytest.raises(UserError, match="ln_schedule: "):
            timeline([("ln_1qk", 0, 0), row], 4, 100)


# --- the state and the learning rate at a step


def test_state_is_a_function_of_the_step_and_an_event_comes_before_its_step():
    events = timeline(read_configs("remove_ln")["ln_schedule"], 12, 1200)
    states = {k: state_at(events, k, sites_of(12)) for k in (0, 200, 201, 421, 441, 1040, 1041, 1060, 1061, 1161)}
    fakes = [list(modes.values()).count("fake") for modes, _ in states.values()]
    assert fakes == [0, 0, 1, 12, 13, 36, 37, 37, 37, 37]
    assert states[1060][1] == {"bos": True, "eot": True}
    assert states[1061][1] == {"bos": True, "eot": False}
    assert states[1161][1] == {"bos": False, "eot": False}
    # a treatment without a row is never on
    assert state_at(timeline([("eot", 3, None)], 12, 100), 0, sites_of(12))[1] == {"bos": False, "eot": True}


def test_a_line_for_each_row_says_before_which_steps():
    rows = [("ln_2", 20, 10), ("h.2.ln_1v", 0.5, None), ("ln_f", 300, None), ("bos", 310, None)]
    lines = describe(rows, timeline(rows, 3, 400))
    found = [re.fullmatch(r" *(\S+) .*before step (.*)", line).groups() for line in lines]
    assert found == [("ln_2", "20, 30, 40"), ("h.2.ln_1v", "200"), ("ln_f", "300"), ("bos", "310")]
    at_once = [("ln_2", 6, 0)]
    assert describe(at_once, timeline(at_once, 3, 400)) == ["  ln_2   fake in all 3 layers before step 6"]


def test_learning_rate_warms_up_and_follows_a_cosine_to_its_floor():
    """The defaults are the post's: 6e-4 after 100 steps, half way at 1,050, 6e-5 from 2,000."""
    names = ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters")
    settings = {name: default_settings()[name] for name in names}
    rates = [learning_rate_at(step, **settings) for step in (0, 49, 100, 1050, 2000, 5000)]
    assert rates == pytest.approx([6e-4 / 101, 6e-4 * 50 / 101, 6e-4, (6e-4 + 6e-5) / 2, 6e-5, 6e-5])


# --- the configs


DEPTHS = dict(remove_ln=12, remove_ln_fast=12, remove_ln_medium=24, remove_ln_large=36, remove_ln_xl=48,
              remove_ln_tiny=4, remove_ln_mine=6)


@pytest.mark.parametrize("name, n_layer", DEPTHS.items())
def test_each_config_removes_all_and_control_keeps_all_else(name, n_layer):
    removal = read_configs(name)
    events = timeline(removal["ln_schedule"], n_layer, removal["max_iters"])
    treatments = {kind for _, kind, _ in events} & {"eot", "bos"}
    assert len(events) - len(treatments) == 3 * n_layer + 1
    if name in FOLLOW_UPS:  # constants over all tokens, and its library's default optimizer
        assert (treatments, removal["std_over"]) == (set(), "all")
        assert (removal["beta1"], removal["beta2"], removal["dropout"]) == (0.9, 0.999, 0.1)
    else:
        assert (treatments, removal["std_over"]) == ({"eot", "bos"}, "ordinary")
    if name not in ("remove_ln_tiny", "remove_ln_mine"):
        sequences = removal["batch_size"] * removal["gradient_accumulation_steps"]
        assert sequences * removal["block_size"] == 2**19
    assert_in_order(events)

    kept = read_configs(name, "control")
    assert {k for k in kept if kept[k] != removal[k]} <= {"ln_schedule", "out_dir", "aux_loss_weight"}
    assert (kept["ln_schedule"], kept["aux_loss_weight"]) == ([], 0)
    assert kept["out_dir"] == removal["out_dir"] + "_control"

    learning = read_configs(name, "faithful")
    changed = {"kl_share", "hidden_weight", "noise_share", "ln_schedule", "out_dir"}
    assert {k for k in learning if learning[k] != removal[k]} == changed
    sooner = timeline(learning["ln_schedule"], n_layer, removal["max_iters"])
    assert_in_order(sooner)
    assert [event[1:] for event in sooner] == [event[1:] for event in events]
    assert sooner[-1][0] == pytest.approx(events[-1][0] / 4, abs=n_layer)  # gaps are rounded down to whole steps
    control = read_configs(name, "faithful", "control")
    assert {k for k in control if control[k] != learning[k]} <= {"ln_schedule", "out_dir", "aux_loss_weight"}
    assert (control["out_dir"], control["ln_schedule"]) == (learning["out_dir"] + "_control", [])


def assert_in_order(events):
    """Each kind waits for the one before."""
    kinds = ("ln_2", "ln_1qk", "ln_1v", "ln_f", "eot", "bos")
    waiting = [k for kind in kinds for k, event, _ in events if event == kind]
    assert waiting == sorted(k for k, *_ in events)


def layers(kind, first, gap, n_layer):
    return [(first + gap * i, kind, i) for i in range(n_layer)]


@pytest.mark.parametrize("name, events", [
    ("remove_ln", [*layers("ln_2", 200, 20, 12), *layers("ln_1qk", 440, 20, 12), *layers("ln_1v", 680, 30, 12),
                   (1040, "ln_f", None), (1060, "eot", None), (1160, "bos", None)]),
    ("remove_ln_fast", [*layers("ln_2", 20, 2, 12), *layers("ln_1qk", 44, 2, 12), *layers("ln_1v", 68, 3, 12),
                        (104, "ln_f", None)]),
    ("remove_ln_xl", [*layers("ln_2", 50, 4, 48), *layers("ln_1qk", 242, 4, 48), *layers("ln_1v", 434, 6, 48),
                      (722, "ln_f", None)]),
])
def test_the_published_events_are_those_of_the_configs(name, events):
    config = read_configs(name)
    assert timeline(config["ln_schedule"], DEPTHS[name], config["max_iters"]) == events


@pytest.mark.parametrize("max_iters", [100, 200, 600])
@pytest.mark.parametrize("n_layer", [1, 6, 48])
def test_remove_ln_mine_removes_every_site_of_a_model_of_any_depth_in_a_run_of_any_length(n_layer, max_iters):
    events = timeline(read_configs("remove_ln_mine")["ln_schedule"], n_layer, max_iters)
    assert all(0 <= step < max_iters for step, _, _ in events)
    for step, mode, on in ((0, "real", True), (max_iters, "fake", False)):
        modes, treatments = state_at(events, step, sites_of(n_layer))
        assert set(modes.values()) == {mode}
        assert treatments == {"bos": on, "eot": on}
