"""
eval.py: its losses, errors and divergences are those of transformers' logits and plain arithmetic; a user's mistake is
one line; tables fit into 80 columns.
"""
import hashlib
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, even_windows, random_hf, read_json, set_all_fake
from torch.nn.functional import cross_entropy

from eval import open_candidate
from model import GPT
from parts.compare import compare, divergences, mean_and_error
from parts.loss import token_losses


@torch.no_grad()
def logits_of_transformers(directory, windows):
    """Windows (n, T + 1) -> (n, T, vocab)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval()(windows[:, :-1]).logits


@torch.no_grad()
def logits_of_ours(directory, windows):
    """The same; eval.py folds an LN-free model, and this does not."""
    return GPT.from_pretrained(directory).eval()(windows[:, :-1])[0]


def losses_of(logits, windows):
    """(n, T), in nats."""
    return cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


# --- cross-entropy


def test_loss_and_errors_against_transformers(run, stdlib):
    other = GPT.from_pretrained(TINY)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn_like(p))
    other.save_pretrained("out/other/model")

    args = [f"--models={TINY},out/other", "--dataset=stdlib", "--tokens=2560", "--json=result.json"]
    done = run("eval.py", *args)

    assert done.code == 0, done.text
    windows = even_windows(10, 256)
    rows = read_json("result.json")["rows"]
    for row, directory in zip(rows, (TINY, "out/other/model"), strict=True):
        losses = losses_of(logits_of_transformers(directory, windows), windows)
        by_window = losses.mean(1)
        assert row["loss"] == pytest.approx(by_window.mean().item(), abs=1e-4)
        assert row["loss_se"] == pytest.approx(by_window.std().item() / 10**0.5, rel=1e-3)
        assert (row["windows"], row["tokens"], row["nonfinite"]) == (10, 2560, 0)
        assert row["median"] == pytest.approx(losses.quantile(0.5).item(), abs=1e-4)
        assert row["p99_9"] == pytest.approx(losses.quantile(0.999).item(), abs=1e-4)
        assert row["max"] == pytest.approx(losses.max().item(), abs=1e-4)
        assert row["loss_by_position"] == pytest.approx(losses.mean(0).tolist(), abs=1e-4)


def test_by_default_the_last_runs_three_models_stand_side_by_side(run, finished):
    done = run("eval.py", "--tokens=2560", "--block_size=64", "--json=result.json")

    assert done.code == 0, done.text
    original, control, free = read_json("result.json")["rows"]
    assert (original["role"], original["source"]) == ("original", TINY)
    assert (control["role"], control["source"]) == ("control", "out/demo_control")
    assert (free["role"], free["source"]) == ("ln_free", "out/demo")

    windows = even_windows(40, 64)
    losses = []  # of each model, by window
    for directory in (TINY, "out/demo_control/model", "out/demo/model"):
        losses.append(losses_of(logits_of_ours(directory, windows), windows).mean(1))
    gap = losses[2] - losses[1]
    assert free["gap"] == pytest.approx(gap.mean().item(), abs=1e-4)
    assert free["gap"] > 0.001
    assert free["gap_se"] == pytest.approx(gap.std().item() / 40**0.5, rel=1e-2)
    assert original["gap"] is None
    assert control["gap"] is None
    assert original["to_original"] is None
    for row, apart in ((control, losses[1] - losses[0]), (free, losses[2] - losses[0])):
        assert row["to_original"] == pytest.approx(apart.mean().item(), abs=1e-4)
        assert row["to_original_se"] == pytest.approx(apart.std().item() / 40**0.5, rel=1e-2)

    lines = done.text.splitlines()
    header = [line.split() for line in lines].index(["original", "control", "LN-free"])
    assert f"{free['loss']:.4f} ± {free['loss_se']:.4f}" in lines[header + 2]
    assert f"{free['gap']:+.4f} ± {free['gap_se']:.4f}" in lines[header + 3]


def test_nan_is_reported_and_not_averaged_away(run, stdlib):
    model = GPT.from_pretrained(TINY)
    with torch.no_grad():
        model.transformer.wpe.weight[200] = 3e38  # overflows to NaN, which reaches all positions, as 0 times NaN is NaN
    model.save_pretrained("broken")

    done = run("eval.py", f"--models={TINY},broken", "--tokens=512", "--json=result.json")

    whole, broken = read_json("result.json")["rows"]
    assert whole["nonfinite"] == 0
    assert 0 < whole["loss"] < 2
    assert broken["nonfinite"] == 512
    assert broken["loss"] is None
    (line,) = (line for line in done.text.splitlines() if line.startswith("tokens not finite"))
    assert line.split()[-2:] == ["0", "512"]
    assert "nan ± nan" in done.text


def test_bfloat16_is_near_float32_and_is_not_float32(run, stdlib):
    losses = []
    for dtype in ("float32", "bfloat16"):
        args = [f"--models={TINY}", "--tokens=2560", f"--dtype={dtype}", "--json=r.json"]
        assert run("eval.py", *args).code == 0
        losses.append(read_json("r.json")["rows"][0]["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=0.02)
    assert losses[0] != losses[1]


def test_under_bfloat16_the_unembedding_and_the_loss_are_in_float32():
    """Against float64, on logits that lie far from zero, as GPT-2's do."""
    one, two = (GPT.from_pretrained(TINY) for _ in range(2))
    with torch.no_grad():
        one.lm_head.weight.add_(3)
        two.lm_head.weight.add_(2)
    x = torch.rand(200, 192).bfloat16()
    targets = torch.randint(0, 256, (200,))
    log_q, log_p = ((x.double() @ m.lm_head.weight.double().T).log_softmax(-1) for m in (one, two))
    assert (x.double() @ one.lm_head.weight.double().T).mean() > 200
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        alone = token_losses(two, x, targets)
        found = compare(dict(one=one, two=two), "one", dict(one=x, two=x), targets)["two"]
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    torch.testing.assert_close(found["kl"].double(), kl, atol=1e-3, rtol=0)
    expected = -log_p.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(found["loss"].double(), expected, atol=1e-3, rtol=0)
    torch.testing.assert_close(alone.double(), expected, atol=1e-3, rtol=0)


def test_a_mean_and_its_error_by_hand():
    mean, error = mean_and_error(np.array([1, 2, 3, 6]))
    assert mean == 3
    # squares of -2, -1, 0 and 3 over 4 - 1, and then over the 4 windows
    assert error == pytest.approx((14 / 3 / 4) ** 0.5)

    mean, error = mean_and_error(np.array([1.5]))
    assert mean == 1.5
    assert math.isnan(error)

    mean, _ = mean_and_error(np.array([2**24, 1], np.float32))  # in float32, 2**24 + 1 is 2**24
    assert float(mean) == 2**23 + 0.5


# --- faithfulness


def test_faithfulness_against_float64_by_hand(run, finished):
    """KL(reference || model), Jensen-Shannon, top-1 agreement and correlation, from the logits of transformers and of
    the unfolded model."""
    done = run("eval.py", "--tokens=640", "--block_size=64", "--json=result.json", "--batch_size=3")

    rows = read_json("result.json")["rows"]
    windows = even_windows(10, 64)
    log_q = logits_of_transformers(TINY, windows).double().log_softmax(-1)
    log_p = logits_of_ours("out/demo/model", windows).double().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    log_m = ((p + q) / 2).log()
    kl = (q * (log_q - log_p)).sum(-1)
    js = (q * (log_q - log_m)).sum(-1) / 2 + (p * (log_p - log_m)).sum(-1) / 2
    agree = (p.argmax(-1) == q.argmax(-1)).double()
    assert rows[2]["kl"] == pytest.approx(kl.mean().item(), abs=1e-5)
    assert rows[2]["kl"] > 1e-3
    assert rows[2]["js"] == pytest.approx(js.mean().item(), abs=1e-5)
    assert rows[2]["agree"] == pytest.approx(agree.mean().item(), abs=2 / 640)

    targets = windows[:, 1:, None]
    losses_p = -log_p.gather(-1, targets).flatten().numpy()
    losses_q = -log_q.gather(-1, targets).flatten().numpy()
    assert rows[2]["correlation"] == pytest.approx(np.corrcoef(losses_p, losses_q)[0, 1], abs=1e-4)

    assert rows[2]["entropy"] == pytest.approx(-(p * log_p).sum(-1).mean().item(), abs=1e-5)
    for row, log_probs in ((rows[0], log_q), (rows[2], log_p)):
        confidence, guess = log_probs.exp().max(-1)
        hit = (guess == windows[:, 1:]).double()
        by_hand = 0
        for low in range(15):
            inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
            if inside.any():
                by_hand += inside.double().mean() * (confidence[inside].mean() - hit[inside].mean()).abs()
        assert row["calibration"] == pytest.approx(by_hand.item(), abs=1e-3)
        assert row["calibration"] > 0.01

    assert rows[2]["reference"] == TINY
    assert "kl" not in rows[0]
    for label in ("KL from reference", "same top token", "99.9th percentile", "entropy", "calibration error"):
        assert label in done.text


def test_the_reference_can_be_another_model(run, finished):
    to_original = ["--models=out/demo", f"--reference={TINY}", "--json=a.json"]
    to_ln_free = [f"--models={TINY}, out/demo,", "--reference=out/demo", "--json=b.json"]
    assert run("eval.py", "--tokens=640", *to_original).code == 0
    assert run("eval.py", "--tokens=640", *to_ln_free).code == 0

    a = read_json("a.json")["rows"]
    b = read_json("b.json")["rows"]
    assert [row["source"] for row in a] == [TINY, "out/demo"]
    assert a[1]["reference"] == TINY
    assert b[0]["reference"] == "out/demo"
    assert "kl" not in b[1]
    assert b[0]["js"] == pytest.approx(a[1]["js"], abs=1e-6)
    assert b[0]["kl"] != a[1]["kl"]

    random_hf(vocab_size=320, n_positions=256).save_pretrained("other")
    assert run("eval.py", "--tokens=640", *to_ln_free[:1], "--reference=other", "--json=c.json").code == 0
    c = read_json("c.json")["rows"]
    assert c[-1]["reference"] == "other"
    assert c[-1]["to_original_source"] == TINY  # where the run began


def test_divergences_of_two_coins_by_hand():
    q = torch.tensor([[1 / 2, 1 / 2]], dtype=torch.float64)  # the reference
    p = torch.tensor([[1 / 4, 3 / 4]], dtype=torch.float64)
    kl, js, agree = divergences(q.log(), p.log())

    # KL(q || p), an expectation under q; KL(p || q) is 0.1308
    assert kl.item() == pytest.approx(math.log(2) / 2 + math.log(2 / 3) / 2, rel=1e-12)
    assert kl.item() == pytest.approx(0.1438, abs=1e-4)
    # the mixture is (3/8, 5/8)
    q_to_mixture = math.log(4 / 3) / 2 + math.log(4 / 5) / 2
    p_to_mixture = math.log(2 / 3) / 4 + math.log(6 / 5) * 3 / 4
    assert js.item() == pytest.approx((q_to_mixture + p_to_mixture) / 2, rel=1e-12)
    assert agree.tolist() == [False]


def test_divergences_against_sums_over_random_distributions():
    generator = np.random.default_rng(0)
    q = generator.dirichlet(np.ones(5), size=8)
    p = generator.dirichlet(np.ones(5), size=8)
    kl, js, agree = divergences(torch.from_numpy(q).log(), torch.from_numpy(p).log())
    swapped_kl, swapped_js, _ = divergences(torch.from_numpy(p).log(), torch.from_numpy(q).log())

    m = (p + q) / 2
    for row in range(8):
        q_to_p = sum(q[row, k] * math.log(q[row, k] / p[row, k]) for k in range(5))
        q_to_m = sum(q[row, k] * math.log(q[row, k] / m[row, k]) for k in range(5))
        p_to_m = sum(p[row, k] * math.log(p[row, k] / m[row, k]) for k in range(5))
        assert kl[row].item() == pytest.approx(q_to_p, rel=1e-9)
        assert js[row].item() == pytest.approx((q_to_m + p_to_m) / 2, rel=1e-9)
        assert agree[row].item() == (q[row].argmax() == p[row].argmax())
    assert 0 < agree.sum() < 8
    assert not torch.allclose(swapped_kl, kl)
    assert torch.allclose(swapped_js, js, rtol=1e-12, atol=0)
    assert (js > 0).all()
    assert (js < math.log(2)).all()


def test_distributions_without_a_common_token_are_ln_2_apart_and_equal_ones_0():
    log_q = torch.tensor([[50.0, 0, 0]], dtype=torch.float64).log_softmax(-1)
    log_p = torch.tensor([[0, 50.0, 0]], dtype=torch.float64).log_softmax(-1)
    kl, js, agree = divergences(log_q, log_p)
    assert kl.item() == pytest.approx(50)  # KL has no such bound
    assert js.item() == pytest.approx(math.log(2), rel=1e-12)
    assert agree.tolist() == [False]

    kl, js, agree = divergences(log_q, log_q)
    assert kl.item() == 0
    assert js.item() == pytest.approx(0, abs=1e-12)
    assert agree.tolist() == [True]


# --- the models


@pytest.mark.parametrize("removed, bos_on, in_folder, in_run", [
    ([], False, "original", "control"),  # a model directory does not show whose it is
    (["h.0.ln_2"], False, "part", "part"),
    ("all", True, "part", "part"),
    ("all", False, "ln_free", "ln_free"),
])
def test_a_models_role(removed, bos_on, in_folder, in_run, tmp_path):
    model = GPT.from_pretrained(TINY)
    for site in model.sites() if removed == "all" else removed:
        model.sites()[site].ln_mode = "fake"
    model.set_treatment("bos", bos_on)
    model.save_pretrained(tmp_path / "run/model")

    for source, role in (("run/model", in_folder), ("run", in_run)):
        candidate = open_candidate(str(tmp_path / source))
        assert (candidate.source, candidate.role) == (str(tmp_path / source), role)
        assert not candidate.model.training
        assert candidate.model.config.folded == (role == "ln_free")
        if role == "part":
            assert candidate.model.ln_modes() == model.ln_modes()


def test_a_folded_model_is_ln_free(tmp_path):
    set_all_fake(GPT.from_pretrained(TINY)).fold().save_pretrained(tmp_path)
    assert open_candidate(str(tmp_path)).role == "ln_free"


def test_models_that_can_not_be_compared_are_refused(run, stdlib):
    random_hf().save_pretrained("other")
    random_hf(vocab_size=320, n_positions=64).save_pretrained("short")

    error = run("eval.py", f"--models={TINY}", "--dataset=pile").error
    assert "pile" in error and "320" in error
    error = run("eval.py", f"--models={TINY},other").error
    assert "other" in error and "320" in error and "300" in error
    error = run("eval.py", f"--models={TINY},short", "--block_size=128").error
    assert "128" in error and "64 positions of short" in error

    done = run("eval.py", f"--models={TINY},short", "--tokens=640", "--json=r.json")
    assert done.code == 0, done.text
    assert "10 windows of 64 val tokens" in done.text


# --- the data


def test_a_text_file_is_a_data_set(run, tmp_path):
    text = "".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(60))
    (tmp_path / "code.py").write_text(text)

    done = run("eval.py", f"--models={TINY}", "--dataset=code.py", "--json=r.json")

    assert done.code == 0, done.text
    (row,) = read_json("r.json")["rows"]
    assert row["windows"] == len(text) // 256
    ids = torch.tensor([*text.encode(), 256])
    gap = (len(ids) - 1) // row["windows"]
    windows = torch.stack([ids[i * gap : i * gap + 257] for i in range(row["windows"])])
    losses = losses_of(logits_of_transformers(TINY, windows), windows)
    assert row["loss"] == pytest.approx(losses.mean().item(), abs=1e-4)


def test_another_tokenizer_is_noted_or_refused(run, stdlib, tmp_path):
    random_hf().save_pretrained("other")
    note = "note: end-of-text is 256 in data/stdlib, but 299 in other"
    assert note in run("eval.py", "--models=other", "--tokens=512").text
    assert "note" not in run("eval.py", f"--models={TINY}", "--tokens=512").text

    (tmp_path / "a.txt").write_text("abc " * 200)
    assert "other" in run("eval.py", "--models=other", "--dataset=a.txt").error


def test_the_val_set_is_named_and_owts_is_said_not_to_be_the_published_one(run, stdlib):
    done = run("eval.py", f"--models={TINY}", "--tokens=512", "--json=r.json")
    meta = read_json("data/stdlib/meta.json")
    named = f"{meta['val']['documents']:,} documents of {meta['source']}"
    assert f"val tokens, of {named}" in done.text
    assert "published figures" not in done.text
    assert read_json("r.json")["rows"][0]["val"] == named

    shutil.copytree("data/stdlib", "part/owt")
    os.remove("data")
    os.rename("part", "data")
    done = run("eval.py", f"--models={TINY}", "--dataset=owt", "--tokens=512", "--json=r.json")
    assert done.code == 0, done.text
    assert "note: not to be compared with the published figures" in done.text
    assert "nanoGPT's val split" in read_json("r.json")["rows"][0]["not_published"]


@pytest.mark.parametrize("rate, still_learning", [
    ("1e-4", True),
    ("0", False),
])
def test_an_original_that_still_learns_is_noted(run, stdlib, rate, still_learning):
    """From random weights, which any training improves; at a rate of 0 nothing is gained."""
    random_hf(vocab_size=320, n_positions=64, n_layer=2).save_pretrained("young")
    short = ["--max_iters=40", "--warmup_iters=1", "--batch_size=4", "--block_size=64", "--eval_iters=1",
             "--compile=False"]
    rates = [f"--learning_rate={rate}", f"--min_lr={rate}", "--dtype=float32"]
    schedule = [("ln_2", 1, 0), ("ln_1qk", 1, 0), ("ln_1v", 1, 0), ("ln_f", 1, None)]
    for args in (["--out_dir=out/mine", f"--ln_schedule={schedule}"], ["--out_dir=out/mine_control"]):
        done = run("train.py", "--init_from=young", *short, *rates, *args)
        assert done.code == 0, done.text
    done = run("eval.py", "--tokens=2560", "--json=r.json")
    assert ("the original is still learning" in done.text) == still_learning, done.text


# --- tables, settings, and the JSON


def test_tables_have_at_most_80_columns_whatever_the_models_are_called(run, finished):
    """Each loss of the JSON is in the table, and the residual table is a screenful, though the JSON has all sites."""
    for name in ("a_copy_with_quite_a_long_name", "another_copy_with_quite_a_long_name"):
        os.makedirs("copies", exist_ok=True)
        os.symlink(os.path.abspath("out/demo/model"), f"copies/{name}")
    sources = [TINY, "out/demo_control", "out/demo", "copies/a_copy_with_quite_a_long_name"]
    sources += ["copies/another_copy_with_quite_a_long_name", "out/demo/model"]
    args = ["--dataset=stdlib,residual", "--tokens=2560", "--json=r.json"]
    done = run("eval.py", f"--models={','.join(sources)}", *args)

    assert done.code == 0, done.text
    tables = done.text.split("next: ")[0]
    assert max(map(len, tables.splitlines())) <= 80
    table, residual = tables.split("residual:")
    rows = read_json("r.json")["rows"]
    for row in rows[:6]:
        assert f"{row['loss']:.4f} ± {row['loss_se']:.4f}" in table
    assert table.count("nats per byte   ") == table.count("loss correlation") == 2
    assert "cross-entropy in nats per byte" in table
    for end in ("out/demo_control", "…quite_a_long_name"):
        assert end in table
    assert all(len(row["sites"]) == 9 for row in rows[6:])
    assert len(residual.splitlines()) <= 2 + 2 * 23


def test_the_json_says_what_was_measured_with_what(run, stdlib, tmp_path):
    assert run("eval.py", f"--models={TINY}", "--tokens=512", "--json=result.json").code == 0
    result = read_json("result.json")
    assert result["command"].endswith(f"eval.py --models={TINY} --tokens=512 --json=result.json")
    assert result["versions"]["torch"] == torch.__version__
    tokens = (tmp_path / "data/stdlib/val.bin").read_bytes()
    assert result["data_sha256"]["stdlib"] == hashlib.sha256(tokens).hexdigest()

    same, other = GPT.from_pretrained(TINY), GPT.from_pretrained(TINY)
    with torch.no_grad():
        other.transformer.wpe.weight[3, 3] += 1
    same.save_pretrained("same")
    other.save_pretrained("other")
    assert run("eval.py", "--models=same,other", "--tokens=512", "--json=again.json").code == 0
    hashes = read_json("again.json")["weights_sha256"]
    assert hashes["same"] == result["weights_sha256"][TINY]
    assert hashes["other"] != hashes["same"]


@pytest.mark.parametrize("args, named", [
    ([], "out/"),
    (["--models=nowhere"], "nowhere"),
    ([f"--models={TINY}", "--dataset=mine"], "'mine'"),
    ([f"--models={TINY}", "--block_size=1024"], "block_size 1024"),
    ([f"--models={TINY}", "--batch_size=0"], "batch_size is 0"),
    ([f"--models={TINY}", "--tokens=-1"], "tokens is -1"),
    ([f"--models={TINY}", "--tokens=100"], "--tokens=100"),
    ([f"--models={TINY}", "--tokens=512", "--json=no/where.json"], "--json=no/where.json"),
    ([f"--models={TINY}", "--json=data"], "data exists"),
    ([f"--models={TINY}", "--dataset=stdlib,empty.txt"], "data/eval_empty.txt/val.bin"),
    ([f"--models={TINY}", "--device=gpu"], "'gpu'"),
])
def test_bad_input_ends_in_one_line(run, stdlib, args, named, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert named in run("eval.py", *args).error
