"""
The testbed and its table of runs: what is on one side of the text is on no other, and every run can be run.
"""
import csv
import os
import re
import runpy
import zipfile

from conftest import REPO, default_settings

from dev import ablations


def test_each_package_is_pinned_and_on_one_side():
    with open(f"{REPO}/dev/testbed/packages.txt") as f:
        lines = [line.split() for line in f if not line.startswith("#")]
    assert {side for side, _ in lines} == {"pretrain", "tune", "choose", "report"}
    names = [re.fullmatch(r"(\S+)==[^=]+", requirement)[1] for _, requirement in lines]
    assert len(set(names)) == len(names)


def test_a_wheel_gives_its_source_without_tables_and_other_encodings(tmp_path):
    files = dict(good="x = 'é'\n", table="x" * 200_001, empty="", latin="é".encode("latin-1"))
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        for name, content in files.items():
            archive.writestr(f"a/{name}.py", content)
        archive.writestr("a/data.txt", "x")
    texts = runpy.run_path(f"{REPO}/dev/testbed/texts.py")
    assert list(texts["sources"](tmp_path / "a.whl")) == [("a/good.py", "x = 'é'\n")]


def test_every_run_of_the_table_has_settings_that_train_py_knows():
    known = default_settings()
    for name, flags in ablations.settings_of_runs().items():
        configs = [flag for flag in flags if flag.endswith(".py")]
        assert flags[: len(configs)] == configs  # they come first
        assert all(os.path.exists(f"{REPO}/{config}") for config in configs)
        assert {flag[2:].split("=")[0] for flag in flags[len(configs) :]} <= set(known), name
    assert {name for name, *_ in ablations.all_runs()} == set(ablations.settings_of_runs())


def test_the_table_has_means_over_seeds_and_the_gap_to_the_best_model_with_ln(run):
    """The best one is chosen on `choose`, and the gap is on each text, over the seeds that both have."""
    with open("mine.csv", "w") as f:
        writer = csv.DictWriter(f, ablations.FIELDS)
        writer.writeheader()
        for name, steps, seed, choose, report in (
            ("recipe", 300, 1, 3.30, 3.50),
            ("recipe", 300, 2, 3.32, 3.56),
            ("control a", 300, 1, 3.20, 3.45),
            ("control a", 300, 2, 3.22, 3.47),
            ("control a", 300, 3, 3.24, 9.99),
            ("control b", 300, 1, 3.25, 3.00),  # better on report alone
            ("recipe", 150, 1, 3.40, 3.60),
        ):
            for text, loss in (("choose text", choose), ("report text", report)):
                figures = dict.fromkeys(ablations.FIGURES, 0.5) | dict(loss=loss)
                writer.writerow(dict(model="m", dataset="d", name=name, steps=steps, seed=seed, text=text) | figures)
    done = run("dev.ablations", "--show", "--path=mine.csv")
    assert done.code == 0, done.text
    title, *lines = done.text.split("\n\n")[1].splitlines()
    assert title.startswith("m, d: report text")
    assert [line[:9].strip() for line in lines] == ["control a", "control b", "recipe", "recipe"]
    # gaps of 0.05 and 0.09: their mean, and 0.04 / sqrt(2)
    others = ["0.5000", "0.50", "0.5", "0", "0.5"]
    assert lines[2].split() == ["recipe", "300", "2", "3.5300", *others, "+0.0700", "0.0283"]
    assert lines[3].split() == ["recipe", "150", "1", "3.6000", *others]


def test_a_name_that_no_run_has_and_a_testbed_that_is_not_there(run):
    assert "out/testbed/model" in run("dev.ablations").error
    os.makedirs("out/testbed/model")
    assert "recipes" in run("dev.ablations", "--only=recipes").error
