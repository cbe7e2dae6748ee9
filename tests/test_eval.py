"""
eval.py: its losses, errors, divergences and residual stds are those of transformers and plain arithmetic; --verify
finds whatever still divides by a std; a user's mistake is one line; tables fit into 80 columns.
"""
import hashlib
import math
import os
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, even_windows, random_hf, read_json
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from eval import open_candidate
from model import GPT
from parts.card import table
from parts.compare import compare, divergences, mean_and_error
from parts.loss import token_losses
from parts.residual import residual_stats
from parts.resemblance import resemblance
from parts.verify import problems


@torch.no_grad()
def logits_of_transformers(directory, windows):
    """Windows (n, T + 1) -> (n, T, vocab)."""
    return AutoModelForCausalLM.from_pretrained(directory).eval()(windows[:, :-1]).logits


@torch.no_grad()
def logits_of_ours(directory, windows):
    """The same; eval.py folds an LN-free model, and this does not."""
    return GPT.from_pretrained(directory).eval()(windows[:, :-1])[0]


def losses_of(logits, windows):
    """(n, T), in nats."""
    return cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


@pytest.fixture
def rows_of(run):
    """rows_of(args...): the rows of eval.py's JSON."""

    def rows_of(*args):
        done = run("eval.py", *args, "--json=rows.json")
        assert done.code == 0, done.text
        return read_json("rows.json")["rows"]

    return rows_of


# --- cross-entropy


def test_loss_and_errors_against_transformers(rows_of, stdlib):
    random_hf(vocab_size=320, n_positions=256).save_pretrained("out/other/model")
    rows = rows_of(f"--models={TINY},out/other", "--dataset=stdlib", "--tokens=2560")
    windows = even_windows(10, 256)
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


def test_by_default_the_last_runs_three_models_stand_side_by_side(rows_of, demo):
    rows = rows_of("--tokens=2560", "--block_size=64")

    sources = dict(original=TINY, control="out/demo_control", ln_free="out/demo")
    assert {row["role"]: row["source"] for row in rows} == sources
    original, control, free = rows
    windows = even_windows(40, 64)
    losses = []  # for each model, by window
    for directory in (TINY, "out/demo_control/model", "out/demo/model"):
        losses.append(losses_of(logits_of_ours(directory, windows), windows).mean(1))
    assert original["gap"] is control["gap"] is original["to_original"] is None
    assert free["gap"] > 0.001
    for row, key, apart in (
        (free, "gap", losses[2] - losses[1]),
        (free, "to_original", losses[2] - losses[0]),
        (control, "to_original", losses[1] - losses[0]),
    ):
        assert row[key] == pytest.approx(apart.mean().item(), abs=1e-4)
        assert row[key + "_se"] == pytest.approx(apart.std().item() / 40**0.5, rel=1e-2)


def test_nan_is_reported_and_not_averaged_away(rows_of, stdlib):
    model = GPT.from_pretrained(TINY)
    with torch.no_grad():
        model.transformer.wpe.weight[200] = 3e38  # overflows to NaN, which reaches all positions, as 0 times NaN is NaN
    model.save_pretrained("broken")
    whole, broken = rows_of(f"--models={TINY},broken", "--tokens=512")
    assert (whole["nonfinite"], broken["nonfinite"], broken["loss"]) == (0, 512, None)


def test_bfloat16_is_near_float32_and_is_not_float32(rows_of, stdlib):
    exact, found = (rows_of(f"--models={TINY}", "--tokens=2560", f"--dtype={dtype}")[0]["loss"]
                    for dtype in ("float32", "bfloat16"))
    assert found != exact
    assert found == pytest.approx(exact, abs=0.02)


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
    # squares of -2, -1, 0 and 3 over 4 - 1, and then over the 4 windows
    assert mean_and_error(np.array([1, 2, 3, 6])) == (3, pytest.approx((14 / 3 / 4) ** 0.5))
    assert mean_and_error(np.array([1.5])) == (1.5, pytest.approx(math.nan, nan_ok=True))
    mean, _ = mean_and_error(np.array([2**24, 1], np.float32))  # in float32, 2**24 + 1 is 2**24
    assert float(mean) == 2**23 + 0.5


# --- faithfulness


def test_a_run_is_evaluated_by_its_name_and_keeps_the_result(run, demo):
    for args in (["out/demo"], []):
        assert run("eval.py", *args, "--tokens=640", "--faithfulness=False").code == 0
        result = read_json("out/demo/eval.json")
        assert [row["source"] for row in result["rows"]] == [TINY, "out/demo_control", "out/demo"]
        assert "\n| stdlib | LN-free |" in table(result["rows"])
        assert "nats per byte" in table(result["rows"])
        assert run("eval.py", *args, "--tokens=640", "--dataset=residual").code == 0  # nothing for a card
        assert read_json("out/demo/eval.json") == result
        os.remove("out/demo/eval.json")


def test_faithfulness_against_float64_by_hand(rows_of, demo):
    """From the logits of transformers and of the unfolded model."""
    original, _, free = rows_of("--tokens=640", "--block_size=64", "--batch_size=3")

    windows = even_windows(10, 64)
    log_q = logits_of_transformers(TINY, windows).double().log_softmax(-1)
    log_p = logits_of_ours("out/demo/model", windows).double().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    log_m = ((p + q) / 2).log()
    kl = (q * (log_q - log_p)).sum(-1)
    js = (q * (log_q - log_m)).sum(-1) / 2 + (p * (log_p - log_m)).sum(-1) / 2
    agree = (p.argmax(-1) == q.argmax(-1)).double()
    losses = [-log_probs.gather(-1, windows[:, 1:, None]).flatten().numpy() for log_probs in (log_p, log_q)]
    assert free["reference"] == TINY
    assert free["kl"] == pytest.approx(kl.mean().item(), abs=1e-5)
    assert free["kl"] > 1e-3
    assert free["js"] == pytest.approx(js.mean().item(), abs=1e-5)
    assert free["agree"] == pytest.approx(agree.mean().item(), abs=2 / 640)
    assert free["correlation"] == pytest.approx(np.corrcoef(*losses)[0, 1], abs=1e-4)
    assert free["entropy"] == pytest.approx(-(p * log_p).sum(-1).mean().item(), abs=1e-5)
    assert "kl" not in original

    for row, log_probs in ((original, log_q), (free, log_p)):
        confidence, guess = log_probs.exp().max(-1)
        hit = (guess == windows[:, 1:]).double()
        by_hand = 0
        for low in range(15):
            inside = (confidence >= low / 15) & (confidence < (low + 1) / 15)
            if inside.any():
                by_hand += inside.double().mean() * (confidence[inside].mean() - hit[inside].mean()).abs()
        assert row["calibration"] == pytest.approx(by_hand.item(), abs=1e-3)
        assert row["calibration"] > 0.01


def test_the_reference_can_be_another_model(rows_of, demo):
    random_hf(vocab_size=320, n_positions=256).save_pretrained("other")
    a = rows_of("--tokens=640", "--models=out/demo", f"--reference={TINY}")
    b = rows_of("--tokens=640", f"--models={TINY}, out/demo,", "--reference=out/demo")
    c = rows_of("--tokens=640", f"--models={TINY},out/demo", "--reference=other")

    assert [row["source"] for row in a] == [TINY, "out/demo"]
    assert (a[1]["reference"], b[0]["reference"], c[-1]["reference"]) == (TINY, "out/demo", "other")
    assert c[-1]["to_original_source"] == TINY  # where the run began
    assert b[0]["js"] == pytest.approx(a[1]["js"], abs=1e-6)
    assert b[0]["kl"] != a[1]["kl"]


@pytest.mark.parametrize("q, p", [
    (np.array([[1 / 2, 1 / 2]]), np.array([[1 / 4, 3 / 4]])),
    (np.array([[1, 1e-22], [1, 1e-22]]), np.array([[1e-22, 1], [1, 1e-22]])),  # without a common token; equal
    np.random.default_rng(0).dirichlet(np.ones(5), size=(2, 8)),
])
def test_divergences_against_sums(q, p):
    kl, js, agree = divergences(torch.from_numpy(q).log(), torch.from_numpy(p).log())
    for i, (q, p) in enumerate(zip(q, p)):
        q_to_p = sum(a * math.log(a / b) for a, b in zip(q, p))
        q_to_m = sum(a * math.log(2 * a / (a + b)) for a, b in zip(q, p))
        p_to_m = sum(b * math.log(2 * b / (a + b)) for a, b in zip(q, p))
        assert kl[i].item() == pytest.approx(q_to_p, rel=1e-9)
        assert js[i].item() == pytest.approx((q_to_m + p_to_m) / 2, rel=1e-9)
        assert agree[i].item() == (np.argmax(q) == np.argmax(p))


# --- the residual stream, and what reads it


def test_circuits_are_compared_with_the_originals_and_less_than_the_controls(run, demo):
    """Against resemblance, whose numbers test_resemblance.py holds against scipy."""
    done = run("eval.py", "out/demo", "--dataset=circuits", "--tokens=700", "--block_size=100", "--json=r.json")
    assert done.code == 0, done.text
    rows = {row["role"]: row for row in read_json("r.json")["rows"]}
    paths = dict(original=TINY, control="out/demo_control/model", ln_free="out/demo/model")
    models = {role: GPT.from_pretrained(path).eval() for role, path in paths.items()}
    models["ln_free"] = models["ln_free"].fold()
    windows = even_windows(7, 100)
    found = resemblance(models, "original", [(window[:-1], window[1:]) for window in windows])
    for key in ("cosine", "attention_js", "contributions", "effects"):
        ours, control = (found[role][key].reshape(7, -1).mean(1) for role in ("ln_free", "control"))
        assert rows["ln_free"][key] == pytest.approx(ours.mean(), abs=1e-6)
        assert rows["ln_free"][key + "_gap"] == pytest.approx((ours - control).mean(), abs=1e-6)
        assert rows["ln_free"][key + "_gap_se"] == pytest.approx((ours - control).std(ddof=1) / 7**0.5, abs=1e-6)
    assert np.array(rows["original"]["copying_by_head"]).shape == (4, 6)
    assert f"{rows['ln_free']['cka']:.4f}" in done.text
    assert run("tools.plot", "r.json").code == 0


@pytest.mark.parametrize("damage", ["partly removed", "another shape"])
def test_circuits_of_models_that_can_not_be_compared(run, removed, stdlib, damage):
    if damage == "partly removed":
        removed.set_ln_mode("ln_2", 1, "real")
        removed.save_pretrained("other")
    else:
        random_hf(vocab_size=320, n_embd=48, n_head=4).save_pretrained("other")
    assert "circuits" in run("eval.py", f"--models={TINY},other", "--dataset=circuits", "--any_tokenizer").error


def test_residual_stds_and_the_sink_rate_against_transformers(rows_of, stdlib):
    """The stds and the attention sink are those of the hidden states and the attention weights."""
    row = rows_of(f"--models={TINY}", "--dataset=stdlib,residual", "--tokens=1280", "--block_size=128")[1]

    x = even_windows(10, 128)[:, :-1]
    hf = AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager").eval()
    mlp_inputs = []
    for block in hf.transformer.h:
        block.ln_2.register_forward_pre_hook(lambda module, args: mlp_inputs.append(args[0]))
    with torch.no_grad():
        out = hf.transformer(x, output_hidden_states=True, output_attentions=True)
    later = torch.arange(128) > 0
    others = (x != 256) & later
    for i in range(4):
        for site, stream in ((f"h.{i}.ln_1", out.hidden_states[i]), (f"h.{i}.ln_2", mlp_inputs[i])):
            found = row["sites"][site]
            std = (stream.var(-1, unbiased=False) + 1e-5).sqrt()
            assert found["position_0"]["mean"] == pytest.approx(std[:, 0].mean().item(), rel=1e-4)
            assert found["others"]["mean"] == pytest.approx(std[others].mean().item(), rel=1e-4)
            assert found["others"]["spread"] == pytest.approx(std[others].std(unbiased=False).item(), rel=1e-3)
            assert (found["eot"]["tokens"] if found["eot"] else 0) == ((x == 256) & later).sum()
    to_0 = torch.stack(out.attentions)[:, :, :, 1:, 0]  # (layers, n, heads, queries)
    assert row["sink_rate"] == pytest.approx((to_0 > 0.3).float().mean().item(), abs=1e-4)
    assert row["sink_heads"] == pytest.approx((to_0.mean((1, 3)) > 0.3).float().mean().item(), abs=1e-4)


def test_folded_and_unfolded_models_have_the_same_residual_stream(removed):
    x = torch.randint(0, 256, (4, 64))
    unfolded, folded = (residual_stats(model, [x])["sites"] for model in (removed, removed.fold()))
    assert unfolded.keys() == folded.keys()
    assert len(unfolded) == 9
    for site in unfolded:
        assert folded[site]["others"]["mean"] == pytest.approx(unfolded[site]["others"]["mean"], rel=1e-3)


def test_verify_passes_what_a_removal_leaves_and_fails_the_rest(run, demo):
    assert run("eval.py", "--verify").code == 0
    GPT.from_pretrained("out/demo/model").fold().save_pretrained("folded")
    done = run("eval.py", "--verify", f"--models=folded,{TINY},out/demo_control")
    assert done.code == 1
    assert not any(f"{source}: NOT" in done.text for source in ("folded", "out/demo"))
    for site in GPT.from_pretrained(TINY).ln_modes():
        assert done.text.count(f"{site} is still real") == done.text.count(f"{site} is not affine") == 2


def test_verify_names_the_one_site_that_fails_and_what_is_hidden_in_a_folded_model(removed):
    removed.set_ln_mode("ln_1v", 2, "real")
    assert [reason.split()[0] for reason in problems(removed)] == ["h.2.ln_1v", "h.2.ln_1v"]  # its mode, not affine
    removed.set_ln_mode("ln_1v", 2, "fake")
    removed.set_treatment("bos", True)
    assert "bos" in problems(removed)[0]

    removed.set_treatment("bos", False)
    model = removed.fold()
    hook = model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda _, args, out: out / out.std(-1, keepdim=True))
    assert [reason.split()[0] for reason in problems(model)] == ["transformer.h.1.mlp.c_fc"]
    hook.remove()
    model.transformer.extra = torch.nn.RMSNorm(192)
    assert problems(model) == ["transformer.extra is a RMSNorm"]


# --- models, data and tables


def test_a_models_role(removed, tmp_path):
    def roles(model):
        """In a model directory, and in a run's folder."""
        model.save_pretrained(tmp_path / "run/model")
        found = [open_candidate(str(tmp_path / source)) for source in ("run/model", "run")]
        assert all(c.model.config.folded == (c.role == "ln_free") for c in found)
        return [c.role for c in found]

    assert roles(GPT.from_pretrained(TINY)) == ["original", "control"]  # the directory does not show whose it is
    assert roles(removed) == roles(removed.fold()) == ["ln_free", "ln_free"]
    removed.set_treatment("bos", True)
    assert roles(removed) == ["part", "part"]
    removed.set_treatment("bos", False)
    removed.set_ln_mode("ln_2", 0, "real")
    assert roles(removed) == ["part", "part"]


def test_the_smallest_context_is_the_window_and_other_vocabularies_are_noted_or_refused(run, rows_of, stdlib):
    random_hf().save_pretrained("other")
    random_hf(vocab_size=320, n_positions=64).save_pretrained("short")
    assert "note: end-of-text is 256" in run("eval.py", "--models=other", "--tokens=512").text
    assert "other" in run("eval.py", f"--models={TINY},other").error
    assert "short" in run("eval.py", f"--models={TINY},short", "--block_size=128").error
    assert rows_of(f"--models={TINY},short", "--tokens=640")[0]["windows"] == 10


def test_a_text_file_is_a_data_set(rows_of, tmp_path):
    text = "".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(60))
    (tmp_path / "code.py").write_text(text)
    (row,) = rows_of(f"--models={TINY}", "--dataset=code.py")
    assert (row["windows"], row["not_published"]) == (len(text) // 256, "")
    ids = torch.tensor([*text.encode(), 256])
    gap = (len(ids) - 1) // row["windows"]
    windows = torch.stack([ids[i : i + 257] for i in range(0, len(ids) - 256, gap)])
    losses = losses_of(logits_of_transformers(TINY, windows), windows)
    assert row["loss"] == pytest.approx(losses.mean().item(), abs=1e-4)


def test_the_val_set_is_named_and_owts_is_said_not_to_be_the_published_one(rows_of, stdlib_data):
    shutil.copytree(f"{stdlib_data}/stdlib", "data/owt")
    (row,) = rows_of(f"--models={TINY}", "--dataset=owt", "--tokens=512")
    meta = read_json("data/owt/meta.json")
    assert row["val"] == f"{meta['val']['documents']:,} documents of {meta['source']}"
    assert "nanoGPT's val split" in row["not_published"]


def test_tables_have_at_most_80_columns_whatever_the_models_are_called(run, stdlib, removed):
    """Each loss of the JSON is in the table, and the residual table is a screenful, though the JSON has all sites."""
    names = ["mine", "a_copy_with_quite_a_long_name", "another_copy_with_quite_a_long_name", "again", "once_again"]
    for name in names:
        removed.save_pretrained(name)
    args = ["--dataset=stdlib,residual", "--tokens=512", "--json=r.json"]
    done = run("eval.py", f"--models={','.join([TINY, *names])}", *args)

    assert done.code == 0, done.text
    tables = done.text.split("next: ")[0]
    assert max(map(len, tables.splitlines())) <= 80
    table, residual = tables.split("residual:")
    rows = read_json("r.json")["rows"]
    for row in rows[:6]:
        assert f"{row['loss']:.4f} ± {row['loss_se']:.4f}" in table
    assert f"{rows[1]['gap']:+.4f} ± {rows[1]['gap_se']:.4f}" in table
    assert table.count("nats per byte   ") == table.count("loss correlation") == 2
    assert "  LN-free 2  a_copy_with_quite_a_long_name\n" in table
    assert all(len(row["sites"]) == 9 for row in rows[6:])
    assert len(residual.splitlines()) <= 2 + 2 * 23


def test_the_json_says_what_was_measured_with_what(rows_of, stdlib, tmp_path):
    model = GPT.from_pretrained(TINY)
    model.save_pretrained("same")
    model.transformer.wpe.weight.data[3, 3] += 1
    model.save_pretrained("other")
    args = [f"--models={TINY},same,other", "--tokens=512"]
    rows_of(*args)
    result = read_json("rows.json")
    assert result["command"].endswith("eval.py " + " ".join(args) + " --json=rows.json")
    assert result["versions"]["torch"] == torch.__version__
    tokens = (tmp_path / "data/stdlib/val.bin").read_bytes()
    assert result["data_sha256"]["stdlib"] == hashlib.sha256(tokens).hexdigest()
    hashes = result["weights_sha256"]
    assert hashes["other"] != hashes["same"] == hashes[TINY]


@pytest.mark.parametrize("args, named", [
    ([], "out/"),
    ([f"--models={TINY}", "--dataset=mine"], "'mine'"),
    ([f"--models={TINY}", "--dataset=pile"], "pile"),  # its tokens are GPT-2's
    ([f"--models={TINY}", "--tokens=100"], "--tokens=100"),
    ([f"--models={TINY}", "--tokens=512", "--json=no/where.json"], "--json=no/where.json"),
    ([f"--models={TINY}", "--json=data"], "data exists"),
    ([f"--models={TINY}", "--dataset=stdlib,empty.txt"], "data/eval_empty.txt/val.bin"),
    ([f"--models={TINY}", "--device=gpu"], "'gpu'"),
])
def test_bad_input_ends_in_one_line(run, stdlib, args, named, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert named in run("eval.py", *args).error
