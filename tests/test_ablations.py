"""
The testbed and its table of runs: what is on one side of the text is on no other, and every run can be run.
"""
import csv
import os
import runpy
import zipfile

from conftest import REPO, default_settings

import ablations

texts = runpy.run_path(os.path.join(REPO, "testbed", "texts.py"))


def test_each_package_is_pinned_and_on_one_side():
    with open(os.path.join(REPO, "testbed", "packages.txt")) as f:
        lines = [line.split() for line in f if not line.startswith("#")]
    assert {side for side, _ in lines} == {"pretrain", "tune", "choose", "report"}
    names = [requirement.split("==")[0] for _, requirement in lines]
    assert len(set(names)) == len(names)
    assert all(requirement.count("==") == 1 for _, requirement in lines)


def test_of_a_wheel_its_source_is_taken_without_tables_and_other_encodings(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as archive:
        archive.writestr("a/good.py", "x = 'é'\n")
        archive.writestr("a/table.py", "x" * 200_001)
        archive.writestr("a/empty.py", "")
        archive.writestr("a/latin.py", "é".encode("latin-1"))
        archive.writestr("a/data.txt", "x")
    assert list(texts["sources"](tmp_path / "a.whl")) == [("a/good.py", "x = 'é'\n")]


def test_every_run_of_the_table_has_settings_that_train_py_knows():
    known = default_settings()
    for name, flags in ablations.all_runs().items():
        for flag in flags:
            if flag.startswith("--"):
                assert flag[2:].split("=")[0] in known, name
            else:
                assert os.path.isfile(os.path.join(REPO, flag)), name


def test_the_table_has_means_over_seeds_the_best_first(run):
    with open("ablations.csv", "w") as f:
        writer = csv.DictWriter(f, ablations.FIELDS)
        writer.writeheader()
        for name, seed, loss in (("worse", 1, 3.0), ("worse", 2, 3.2), ("better", 1, 3.05)):
            numbers = {key: 0.5 for key in ablations.FIELDS[6:]} | dict(choose_loss=loss)
            writer.writerow(dict(name=name, steps=300, seed=seed) | numbers)
    done = run("ablations.py", "--show")
    assert done.code == 0, done.text
    head, first, second = done.text.strip("\n").splitlines()
    assert max(map(len, (head, first, second))) <= 80
    assert first.split()[:4] == ["better", "300", "1", "3.0500"]
    assert second.split()[:5] == ["worse", "300", "2", "3.1000", f"{0.2 / 2 ** 0.5:.4f}"]


def test_without_the_testbed_nothing_is_run(run):
    assert "out/testbed/model is not there: run `make testbed` first" in run("ablations.py").error
