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

POST = [
    ("ln_2", 200, 20),
    ("ln_1qk", 440, 20),
    ("ln_1v", 680, 30),
    ("ln_f", 1040, None),
    ("eot", 1060, None),
    ("bos", 1160, None),
]
FOLLOW_UP = [
    ("ln_2", 20, 2),
    ("ln_1qk", 44, 2),
    ("ln_1v", 68, 3),
    ("ln_f", 104, None),
]

FOLLOW_UPS = ("remove_ln_fast", "remove_ln_medium", "remove_ln_large", "remove_ln_xl")

def sites_of(n_layer):
    """The names of the sites of a model of so many layers."""
    names = []
    for layer in range(n_layer):
        names += [f"h.{layer}.ln_1qk", f"h.{layer}.ln_1v", f"h.{layer}.ln_2"]
    return [*names, "ln_f"]


# --- rows to events


def test_the_posts_schedule_gives_its_events():
    events = timeline(POST, 12, 1200)
    assert events[:12] == [(200 + 20 * i, "ln_2", i) for i in range(12)]
    assert events[12:24] == [(440 + 20 * i, "ln_1qk", i) for i in range(12)]
    assert events[24:36] == [(680 + 30 * i, "ln_1v", i) for i in range(12)]
    assert events[36:] == [(1040, "ln_f", None), (1060, "eot", None), (1160, "bos", None)]
    assert [events[i][0] for i in (11, 23, 35)] == [420, 660, 1010]


def test_the_follow_ups_schedule_gives_its_events():
    events = timeline(FOLLOW_UP, 12, 300)
    steps = {kind: [k for k, name, _ in events if name == kind] for kind in ("ln_2", "ln_1qk", "ln_1v")}
    assert steps["ln_2"] == [20, 22, 24, 26, 28, 30, 32, 34, 36, 38, 40, 42]
    assert steps["ln_1qk"] == [44, 46, 48, 50, 52, 54, 56, 58, 60, 62, 64, 66]
    assert steps["ln_1v"] == [68, 71, 74, 77, 80, 83, 86, 89, 92, 95, 98, 101]
    assert events[36:] == [(104, "ln_f", None)]


def test_gap_0_is_all_layers_at_once_and_empty_is_the_control():
    assert timeline([("ln_2", 3, 0)], 4, 10) == [(3, "ln_2", layer) for layer in range(4)]
    assert timeline([], 4, 10) == []


def test_a_site_may_be_named():
    rows = [
        ("h.5.ln_2", 700, None),
        ("h.0.ln_1qk", 7, None),
        ("h.11.ln_1v", 0.5, None),
    ]
    assert timeline(rows, 12, 800) == [
        (7, "ln_1qk", 0),
        (400, "ln_1v", 11),
        (700, "ln_2", 5),
    ]


def test_several_events_of_one_step_keep_the_schedules_order():
    rows = [
        ("bos", 6, None),
        ("ln_f", 5, None),
        ("h.1.ln_1v", 5, None),
        ("ln_2", 5, 0),
        ("eot", 5, None),
        ("ln_1qk", 4, 1),
    ]
    assert timeline(rows, 2, 10) == [
        (4, "ln_1qk", 0),
        (5, "ln_f", None),
        (5, "ln_1v", 1),
        (5, "ln_2", 0),
        (5, "ln_2", 1),
        (5, "eot", None),
        (5, "ln_1qk", 1),
        (6, "bos", None),
    ]


# --- fractions of a run


def test_a_pair_of_fractions_spreads_the_layers_of_a_kind():
    """From step 20 of 200 to step 60: a layer every 40 / 6 steps, rounded down."""
    assert timeline([("ln_2", (0.1, 0.3), None)], 6, 200) == [
        (20, "ln_2", 0),
        (26, "ln_2", 1),
        (33, "ln_2", 2),
        (40, "ln_2", 3),
        (46, "ln_2", 4),
        (53, "ln_2", 5),
    ]


def test_a_pair_may_be_of_steps():
    assert timeline([("ln_2", (10, 40), None)], 3, 200) == [(10, "ln_2", 0), (20, "ln_2", 1), (30, "ln_2", 2)]
    assert timeline([("ln_2", (10, 10), None)], 2, 200) == [(10, "ln_2", 0), (10, "ln_2", 1)]


def test_one_fraction_is_the_first_step():
    assert timeline([("ln_f", 0.35, None)], 6, 200) == [(70, "ln_f", None)]
    assert timeline([("bos", 0.0, None)], 6, 200) == [(0, "bos", None)]
    assert timeline([("ln_2", 0.25, 3)], 3, 200) == [(50, "ln_2", 0), (53, "ln_2", 1), (56, "ln_2", 2)]


# --- rows that can't run: a model of 4 layers, a run of 100 steps


@pytest.mark.parametrize("row, names", [
    # not a row
    ("ln_2", "'ln_2'"),
    ("bos", "'bos'"),  # three letters, as a row has three columns
    (5, "5"),
    ([], "[]"),
    (("ln_2", 1), "('ln_2', 1)"),
    (("ln_2", 1, 2, "up"), "('ln_2', 1, 2, 'up')"),
    ({"ln_2": 1}, "{'ln_2': 1}"),
    # no site of the model
    (("ln_3", 5, 1), "'ln_3'"),
    (("h.4.ln_2", 5, None), "'h.4.ln_2'"),  # the model has layers 0 to 3
    (("h.-1.ln_2", 5, None), "'h.-1.ln_2'"),
    (("h.0.ln_f", 5, None), "'h.0.ln_f'"),
    ((3, 5, 1), "unknown site 3"),
    # no step
    (("ln_2", -1, 2), "-1"),
    (("ln_2", True, 2), "True"),
    (("bos", True, None), "True"),
    (("ln_2", "5", 2), "'5'"),
    (("ln_f", None, None), "ln_f"),
    (("ln_2", 1.5, 2), "1.5"),
    (("ln_f", -0.1, None), "-0.1"),
    (("ln_f", float("nan"), None), "nan"),
    # no pair of steps
    (("ln_2", (0.3, 0.1), None), "(0.3, 0.1)"),
    (("ln_2", [30, 10], None), "[30, 10]"),
    (("ln_2", (0.1, 1), None), "(0.1, 1)"),
    (("ln_2", (0.5, 1.5), None), "(0.5, 1.5)"),
    (("ln_2", (0.1, 0.2, 0.3), None), "(0.1, 0.2, 0.3)"),
    (("ln_2", (0.1, 0.3), 2), "(0.1, 0.3)"),
    (("ln_f", (0.1, 0.3), None), "(0.1, 0.3)"),
    # no steps between layers
    (("ln_2", 1, None), "third column"),
    (("ln_2", 1, -1), "third column"),
    (("ln_2", 1, True), "third column"),
    (("ln_2", 1, 0.5), "third column"),
    (("ln_f", 1, 2), "third column"),
    (("eot", 1, 1), "third column"),
    (("h.2.ln_2", 1, 2), "third column"),
    # beyond the run: the last event is named, so that one reading tells how many steps are needed
    (("ln_2", 98, 1), "h.3.ln_2 at step 101"),
    (("bos", 100, None), "bos at step 100"),
    (("h.2.ln_2", 100, None), "h.2.ln_2 at step 100"),
    (("ln_f", 1.0, None), "ln_f at step 100"),
    (("ln_2", (100, 100), None), "h.3.ln_2 at step 100"),
    # twice
    (("ln_1qk", 50, 1), "h.0.ln_1qk has two events"),
    (("h.3.ln_1qk", 50, None), "h.3.ln_1qk has two events"),
])
def test_a_row_that_can_not_run_is_refused_by_name(row, names):
    with pytest.raises(UserError, match="ln_schedule: .*" + re.escape(names)):
        timeline([("ln_1qk", 0, 0), row], 4, 100)


# --- the state at a step


def test_state_is_a_function_of_the_step_and_an_event_comes_before_its_step():
    names = sites_of(12)
    events = timeline(POST, 12, 1200)

    def fake(step):
        modes, _ = state_at(events, step, names)
        return list(modes.values()).count("fake")

    def treatments(step):
        return state_at(events, step, names)[1]

    assert [fake(k) for k in (0, 200, 201, 421, 441, 1040, 1041, 1200)] == [0, 0, 1, 12, 13, 36, 37, 37]
    assert treatments(1060) == {"bos": True, "eot": True}
    assert treatments(1061) == {"bos": True, "eot": False}
    assert treatments(1161) == {"bos": False, "eot": False}


def test_a_treatment_without_a_row_is_never_on():
    names = sites_of(12)
    assert state_at(timeline([("ln_2", 0, 1)], 12, 100), 0, names)[1] == {"bos": False, "eot": False}
    assert state_at(timeline([("eot", 3, None)], 12, 100), 0, names)[1] == {"bos": False, "eot": True}


def test_state_follows_rows_in_any_order():
    rows = [
        ("h.1.ln_2", 4, None),
        ("h.0.ln_2", 6, None),
        ("h.0.ln_1v", 5, None),
    ]
    modes, treatments = state_at(timeline(rows, 2, 10), 6, sites_of(2))
    assert modes == {
        "h.0.ln_1qk": "real",
        "h.0.ln_1v": "fake",
        "h.0.ln_2": "real",
        "h.1.ln_1qk": "real",
        "h.1.ln_1v": "real",
        "h.1.ln_2": "fake",
        "ln_f": "real",
    }
    assert treatments == {"bos": False, "eot": False}


# --- what is printed before a run


def test_a_line_for_each_row_says_before_which_steps():
    rows = [
        ("ln_2", 20, 10),
        ("h.10.ln_1v", 0.5, None),
        ("ln_f", 300, None),
        ("bos", 310, None),
    ]
    assert describe(rows, timeline(rows, 12, 400)) == [
        "  ln_2   fake before step 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130",
        "  h.10.ln_1v fake before step 200",
        "  ln_f   fake before step 300",
        "  bos    off before step 310",
    ]


# --- the learning rate


def test_learning_rate_warms_up_and_follows_a_cosine_to_its_floor():
    """The defaults are the post's: 6e-4 after 100 steps, half way at 1,050, 6e-5 from 2,000."""
    defaults = default_settings()
    names = ("learning_rate", "min_lr", "warmup_iters", "lr_decay_iters")
    settings = {name: defaults[name] for name in names}

    def rate(step):
        return learning_rate_at(step, **settings)

    assert rate(0) == pytest.approx(6e-4 / 101)
    assert rate(49) == pytest.approx(6e-4 * 50 / 101)
    assert rate(100) == 6e-4
    assert rate(1050) == pytest.approx((6e-4 + 6e-5) / 2)
    assert rate(2000) == rate(5000) == pytest.approx(6e-5)


# --- the configs


def read_configs(*names):
    """The settings of train.py after config/NAME.py of each name, in order."""
    paths = [os.path.join(REPO, "config", f"{name}.py") for name in names]
    return configure(default_settings(), paths, "", configs=True)


@pytest.mark.parametrize("name, n_layer", [
    ("remove_ln", 12),
    ("remove_ln_fast", 12),
    ("remove_ln_medium", 24),
    ("remove_ln_large", 36),
    ("remove_ln_xl", 48),
    ("remove_ln_tiny", 4),
    ("remove_ln_mine", 6),
])
def test_each_config_removes_all_and_control_keeps_all_else(name, n_layer):
    removal = read_configs(name)
    events = timeline(removal["ln_schedule"], n_layer, removal["max_iters"])
    sites = {event[1:] for event in events if event[1] not in ("eot", "bos")}
    treatments = {kind for _, kind, _ in events} & {"eot", "bos"}
    assert len(sites) == 3 * n_layer + 1
    # the follow-up's constants are over all tokens, position 0 and end-of-text among them
    assert treatments == (set() if removal["std_over"] == "all" else {"eot", "bos"})
    assert (removal["std_over"] == "all") == (name in FOLLOW_UPS)

    # each kind waits for the one before
    waiting = []
    for kind in ("ln_2", "ln_1qk", "ln_1v", "ln_f", "eot", "bos"):
        waiting += [k for k, name, _ in events if name == kind]
    assert waiting == sorted(k for k, *_ in events)

    kept = read_configs(name, "control")
    assert {k for k in kept if kept[k] != removal[k]} <= {"ln_schedule", "out_dir", "aux_loss_weight"}
    assert kept["ln_schedule"] == []
    assert kept["aux_loss_weight"] == 0
    assert kept["out_dir"] == removal["out_dir"] + "_control"

    learning = read_configs(name, "faithful")
    assert {k for k in learning if learning[k] != removal[k]} == {"kl_share", "out_dir"}
    control = read_configs(name, "faithful", "control")
    assert control["out_dir"] == learning["out_dir"] + "_control"
    assert control["kl_share"] == learning["kl_share"] == 0.5


@pytest.mark.parametrize("name", [
    "remove_ln",
    "remove_ln_fast",
    "remove_ln_medium",
    "remove_ln_large",
    "remove_ln_xl",
])
def test_a_step_of_gpt2_is_half_a_million_tokens(name):
    settings = read_configs(name)
    sequences = settings["batch_size"] * settings["gradient_accumulation_steps"]
    assert sequences * settings["block_size"] == 2**19


def test_the_published_schedules_are_in_the_configs():
    assert read_configs("remove_ln")["ln_schedule"] == POST
    assert read_configs("remove_ln_fast")["ln_schedule"] == FOLLOW_UP
    assert read_configs("remove_ln_xl")["ln_schedule"] == [
        ("ln_2", 50, 4),
        ("ln_1qk", 242, 4),
        ("ln_1v", 434, 6),
        ("ln_f", 722, None),
    ]


@pytest.mark.parametrize("name", FOLLOW_UPS)
def test_the_follow_ups_optimizer_is_its_librarys_default(name):
    settings = read_configs(name)
    assert (settings["beta1"], settings["beta2"], settings["dropout"]) == (0.9, 0.999, 0.1)


@pytest.mark.parametrize("max_iters", [
    100,
    200,
    600,
])
@pytest.mark.parametrize("n_layer", [
    1,
    6,
    48,
])
def test_remove_ln_mine_removes_every_site_of_a_model_of_any_depth_in_a_run_of_any_length(n_layer, max_iters):
    rows = read_configs("remove_ln_mine")["ln_schedule"]
    events = timeline(rows, n_layer, max_iters)
    assert all(0 <= step < max_iters for step, _, _ in events)
    steps = [step for step, _, _ in events]
    assert steps == sorted(steps)

    before, treatments = state_at(events, 0, sites_of(n_layer))
    assert set(before.values()) == {"real"}
    assert treatments == {"bos": True, "eot": True}
    after, treatments = state_at(events, max_iters, sites_of(n_layer))
    assert set(after.values()) == {"fake"}
    assert treatments == {"bos": False, "eot": False}
