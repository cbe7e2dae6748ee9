"""eval.py and plot.py: what is reported of a run."""
import json
import os

import numpy as np
import pytest
import torch
from conftest import TINY, random_hf, set_all_fake
from test_train import SCHEDULE, SHORT

from model import GPT


@pytest.fixture
def finished(run, stdlib):
    """A short removal and its control, trained at a rate that moves the weights little."""
    rate = ["--learning_rate=1e-5", "--min_lr=1e-5"]
    assert run("train.py", *SHORT, *rate, f"--ln_schedule={SCHEDULE}", "--out_dir=out/demo").code == 0
    assert run("train.py", *SHORT, *rate, "--out_dir=out/demo_control").code == 0


def windows_by_hand(n, T):
    tokens = np.fromfile("data/stdlib/val.bin", dtype="<u2").astype(np.int64)
    gap = (len(tokens) - 1) // n
    return torch.stack([torch.from_numpy(tokens[i * gap : i * gap + T + 1]) for i in range(n)])


def test_loss_and_errors_against_transformers(run, stdlib, tmp_path):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    other = GPT.from_pretrained(TINY)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn_like(p))
    other.save_pretrained("out/other/model")
    done = run("eval.py", f"--models={TINY},out/other", "--dataset=stdlib", "--tokens=2560", "--json=result.json")
    assert done.code == 0, done.text
    rows = json.load(open("result.json"))["rows"]
    x, losses = windows_by_hand(10, 256), []
    for row, source in zip(rows, (TINY, "out/other/model")):
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(source).eval()(x[:, :-1]).logits
        by_window = torch.nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").mean(1)
        assert row["loss"] == pytest.approx(by_window.mean().item(), abs=1e-4)
        assert row["loss_se"] == pytest.approx(by_window.std().item() / 10**0.5, rel=1e-3)
        assert (row["windows"], row["tokens"], row["nonfinite"]) == (10, 2560, 0)
        losses.append(by_token := torch.nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none"))
        for key, q in (("median", 0.5), ("p99_9", 0.999), ("max", 1)):
            assert row[key] == pytest.approx(by_token.quantile(q).item(), abs=1e-4)
        assert row["loss_by_position"] == pytest.approx(by_token.mean(0).tolist(), abs=1e-4)


def test_by_default_the_last_runs_three_models_stand_side_by_side(run, finished):
    done = run("eval.py", "--tokens=2560", "--block_size=64", "--json=result.json")
    assert done.code == 0, done.text
    rows = json.load(open("result.json"))["rows"]
    assert [(r["role"], r["source"]) for r in rows] == [("original", TINY), ("control", "out/demo_control"), ("ln_free", "out/demo")]
    x = windows_by_hand(40, 64)
    losses = []
    for source in (TINY, "out/demo_control/model", "out/demo/model"):
        with torch.no_grad():
            logits = GPT.from_pretrained(source).eval()(x[:, :-1])[0]  # LN-free: not folded here, but in eval.py
        losses.append(torch.nn.functional.cross_entropy(logits.transpose(1, 2), x[:, 1:], reduction="none").mean(1))
    gap = losses[2] - losses[1]
    assert rows[2]["gap"] == pytest.approx(gap.mean().item(), abs=1e-4) and rows[2]["gap"] > 0.001
    assert rows[2]["gap_se"] == pytest.approx(gap.std().item() / 40**0.5, rel=1e-2)
    assert rows[0]["gap"] is None and rows[1]["gap"] is None and rows[0]["to_original"] is None
    for row, apart in ((rows[1], losses[1] - losses[0]), (rows[2], losses[2] - losses[0])):
        assert row["to_original"] == pytest.approx(apart.mean().item(), abs=1e-4)
        assert row["to_original_se"] == pytest.approx(apart.std().item() / 40**0.5, rel=1e-2)
    table = done.text.splitlines()
    header = next(line for line in table if line.split() == ["original", "control", "LN-free"])
    assert f"{rows[2]['loss']:.4f} ± {rows[2]['loss_se']:.4f}" in table[table.index(header) + 2]
    assert f"{rows[2]['gap']:+.4f} ± {rows[2]['gap_se']:.4f}" in table[table.index(header) + 3]


def test_a_half_removed_model_is_not_called_ln_free(run, stdlib):
    model = GPT.from_pretrained(TINY)
    set_all_fake(model).set_ln_mode("ln_f", None, "real")
    model.save_pretrained("half")
    done = run("eval.py", "--models=half", "--tokens=512", "--json=result.json")
    assert done.code == 0 and json.load(open("result.json"))["rows"][0]["role"] == "part" and "part removed" in done.text


@pytest.mark.parametrize("args, message", [
    ([], "no finished removal under out/"), (["--models=nowhere"], "nowhere is not a directory here"),
    ([f"--models={TINY}", "--dataset=mine"], "unknown data set 'mine': there is stdlib, owt, pile, pile-filtered, hellaswag, residual"),
    ([f"--models={TINY}", "--block_size=1024"], "block_size 1024 is beyond the 256 positions"),
    ([f"--models={TINY}", "--batch_size=0"], "batch_size must be 1 or more"),
    ([f"--models={TINY}", "--tokens=100"], "less than one window of 256"), ([f"--models={TINY}", "--tokens=512", "--json=no/where.json"], "there is no directory no"),
    ([f"--models={TINY}", "--json=data"], "--json=data is a directory"),
    ([f"--models={TINY}", "--dataset=stdlib,empty.txt"], "data/eval_empty.txt/val.bin has 1 tokens"), ([f"--models={TINY}", "--device=gpu"], "device 'gpu' is not on this machine"),
])
def test_bad_input_ends_in_one_line(run, stdlib, args, message):
    open("empty.txt", "w").close()
    done = run("eval.py", *args)
    assert done.code == 1 and message in done.text.splitlines()[-1] and "Traceback" not in done.text


# --- faithfulness


def test_faithfulness_against_float64_by_hand(run, finished):
    """KL(reference || model), Jensen-Shannon, top-1 agreement and correlation, from transformers' and the unfolded model's logits."""
    from transformers import AutoModelForCausalLM

    done = run("eval.py", "--tokens=640", "--block_size=64", "--json=result.json", "--batch_size=3")
    rows = json.load(open("result.json"))["rows"]
    x = windows_by_hand(10, 64)
    with torch.no_grad():
        log_q = AutoModelForCausalLM.from_pretrained(TINY).eval()(x[:, :-1]).logits.double().log_softmax(-1)
        log_p = GPT.from_pretrained("out/demo/model").eval()(x[:, :-1])[0].double().log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    m = (p + q) / 2
    assert rows[2]["kl"] == pytest.approx((q * (log_q - log_p)).sum(-1).mean().item(), abs=1e-5) and rows[2]["kl"] > 1e-3
    assert rows[2]["js"] == pytest.approx(((q * (log_q - m.log())).sum(-1) / 2 + (p * (log_p - m.log())).sum(-1) / 2).mean().item(), abs=1e-5)
    assert rows[2]["agree"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=2 / 640)
    losses = [-log.gather(-1, x[:, 1:, None]).flatten().numpy() for log in (log_p, log_q)]
    assert rows[2]["correlation"] == pytest.approx(np.corrcoef(*losses)[0, 1], abs=1e-4)
    assert rows[2]["reference"] == TINY and "kl" not in rows[0]
    assert all(label in done.text for label in ("KL from reference", "same top token", "99.9th percentile"))


def test_the_reference_can_be_another_model(run, finished):
    assert run("eval.py", "--tokens=640", "--models=out/demo", f"--reference={TINY}", "--json=a.json").code == 0
    assert run("eval.py", "--tokens=640", f"--models={TINY}, out/demo,", "--reference=out/demo", "--json=b.json").code == 0
    a, b = (json.load(open(path))["rows"] for path in ("a.json", "b.json"))
    assert [r["source"] for r in a] == [TINY, "out/demo"] and a[1]["reference"] == TINY
    assert b[0]["reference"] == "out/demo" and "kl" not in b[1] and b[0]["js"] == pytest.approx(a[1]["js"], abs=1e-6) and b[0]["kl"] != a[1]["kl"]


# --- what else goes into it


def test_a_model_that_returns_nan_is_reported_and_not_averaged_away(run, stdlib):
    model = GPT.from_pretrained(TINY)
    with torch.no_grad():
        model.transformer.wpe.weight[200] = float("nan")  # it reaches all, 0 times NaN being NaN
    model.save_pretrained("broken")
    done = run("eval.py", f"--models={TINY},broken", "--tokens=512", "--json=result.json")
    whole, broken = json.load(open("result.json"))["rows"]
    assert whole["nonfinite"] == 0 and 0 < whole["loss"] < 2
    assert broken["nonfinite"] == 512 and broken["loss"] is None and "512 tokens" in done.text and "nan ± nan" in done.text


def test_the_json_says_what_was_measured_with_what(run, stdlib):
    import hashlib

    assert run("eval.py", f"--models={TINY}", "--tokens=512", "--json=result.json").code == 0
    result = json.load(open("result.json"))
    assert result["command"].endswith(f"eval.py --models={TINY} --tokens=512 --json=result.json") and result["versions"]["torch"] == torch.__version__
    assert result["data_sha256"]["stdlib"] == hashlib.sha256(open("data/stdlib/val.bin", "rb").read()).hexdigest()
    same, other = GPT.from_pretrained(TINY), GPT.from_pretrained(TINY)
    with torch.no_grad():
        other.transformer.wpe.weight[3, 3] += 1
    same.save_pretrained("same"), other.save_pretrained("other")
    assert run("eval.py", "--models=same,other", "--tokens=512", "--json=again.json").code == 0
    hashes = json.load(open("again.json"))["weights_sha256"]
    assert hashes["same"] == result["weights_sha256"][TINY] != hashes["other"]


def test_bfloat16_is_near_float32_and_is_not_float32(run, stdlib):
    losses = []
    for dtype in ("float32", "bfloat16"):
        assert run("eval.py", f"--models={TINY}", "--tokens=2560", f"--dtype={dtype}", "--json=r.json").code == 0
        losses.append(json.load(open("r.json"))["rows"][0]["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=0.02) and losses[0] != losses[1]


def test_tokens_of_another_tokenizer_are_noted(run, tmp_path):
    random_hf().save_pretrained("other")
    (tmp_path / "a.txt").write_text("abc " * 200)
    note = "note: end-of-text is 256 in data/eval_a.txt, but 299 in other: was it trained on such tokens?"
    assert note in run("eval.py", "--models=other", "--dataset=a.txt").text
    assert "note" not in run("eval.py", f"--models={TINY}", "--dataset=a.txt").text


def test_a_text_file_is_a_data_set(run, tmp_path):
    from transformers import AutoModelForCausalLM

    text = "".join(f"def f_{i}(x):\n    return x + {i}\n" for i in range(60))
    (tmp_path / "code.py").write_text(text)
    assert run("eval.py", f"--models={TINY}", "--dataset=code.py", "--json=r.json").code == 0
    (row,) = json.load(open("r.json"))["rows"]
    ids = torch.tensor([*text.encode(), 256])
    windows = torch.stack([ids[i * ((len(ids) - 1) // row["windows"]) :][:257] for i in range(row["windows"])])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(TINY).eval()(windows[:, :-1]).logits
    assert row["windows"] == (len(text)) // 256
    assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item(), abs=1e-4)


def test_models_that_can_not_be_compared_are_refused(run, stdlib):
    random_hf().save_pretrained("other")
    random_hf(vocab_size=320, n_positions=64).save_pretrained("short")
    assert "pile is fetched as GPT-2's 50,257 tokens, but the models have a vocabulary of 320" in run("eval.py", f"--models={TINY}", "--dataset=pile").text
    assert f"{TINY} has a vocabulary of 320 and other one of 300: compare models of one tokenizer" in run("eval.py", f"--models={TINY},other").text
    assert "block_size 128 is beyond the 64 positions of short" in run("eval.py", f"--models={TINY},short", "--block_size=128").text
    done = run("eval.py", f"--models={TINY},short", "--tokens=640", "--json=r.json")
    assert done.code == 0 and "10 windows of 64 val tokens" in done.text


# --- the residual stream


def test_residual_stds_and_the_sink_rate_against_transformers(run, stdlib):
    from transformers import AutoModelForCausalLM

    done = run("eval.py", f"--models={TINY}", "--dataset=stdlib,residual", "--tokens=1280", "--block_size=128", "--json=r.json")
    row = json.load(open("r.json"))["rows"][1]
    x = windows_by_hand(10, 128)[:, :-1]
    hf = AutoModelForCausalLM.from_pretrained(TINY, attn_implementation="eager").eval()
    mlp_inputs = []
    for block in hf.transformer.h:
        block.ln_2.register_forward_pre_hook(lambda module, args: mlp_inputs.append(args[0]))
    with torch.no_grad():
        out = hf.transformer(x, output_hidden_states=True, output_attentions=True)
    std = lambda h: (h.var(-1, unbiased=False) + 1e-5).sqrt()
    eot = (x == 256) & (torch.arange(128) > 0)
    others = (x != 256) & (torch.arange(128) > 0)
    for site, h in [(f"h.{i}.ln_1", out.hidden_states[i]) for i in range(4)] + [(f"h.{i}.ln_2", h) for i, h in enumerate(mlp_inputs)]:
        assert row["sites"][site]["position_0"]["mean"] == pytest.approx(std(h)[:, 0].mean().item(), rel=1e-4)
        assert row["sites"][site]["others"]["mean"] == pytest.approx(std(h)[others].mean().item(), rel=1e-4)
        assert row["sites"][site]["others"]["spread"] == pytest.approx(std(h)[others].std(unbiased=False).item(), rel=1e-3)
        assert (row["sites"][site]["eot"] or dict(tokens=0))["tokens"] == eot.sum()
    sinks = torch.stack(out.attentions)[:, :, :, 1:, 0] > 0.3
    assert row["sink_rate"] == pytest.approx(sinks.float().mean().item(), abs=1e-4)
    assert "attention sink rate" in done.text and "h.3.ln_2, position 0" in done.text and "ln_f, others" in done.text


def test_folded_and_unfolded_models_have_the_same_residual_stream(finished):
    import residual

    model = GPT.from_pretrained("out/demo/model").eval()
    x = [windows_by_hand(4, 64)[:, :-1]]
    a, b = residual.stats(model, x), residual.stats(model.fold(), x)
    assert a["sites"].keys() == b["sites"].keys() and len(a["sites"]) == 9
    for site in a["sites"]:
        assert a["sites"][site]["others"]["mean"] == pytest.approx(b["sites"][site]["others"]["mean"], rel=1e-3)


def test_the_picture_of_the_residual_stream(run, finished):
    assert run("eval.py", "--dataset=residual", "--tokens=1280", "--json=r.json").code == 0
    done = run("plot.py", "r.json")
    assert done.code == 0 and done.text == "r.png\n" and open("r.png", "rb").read(4) == b"\x89PNG"
    assert "has no row of --dataset=residual" in run("plot.py", "data/stdlib/meta.json").text


# --- --verify


def test_verify_passes_what_a_removal_leaves_and_fails_the_rest(run, finished):
    done = run("eval.py", "--verify")
    assert done.code == 0 and done.text.startswith("out/demo: LN-free"), done.text
    GPT.from_pretrained("out/demo/model").fold().save_pretrained("folded")
    assert run("eval.py", "--verify", "--models=folded").code == 0
    for source in (TINY, "out/demo_control"):
        done = run("eval.py", "--verify", f"--models={source}")
        assert done.code == 1 and "NOT LN-free" in done.text
        for site in GPT.from_pretrained(TINY).ln_modes():
            assert f"{site} is still real" in done.text and f"{site} is not affine" in done.text


def test_verify_names_the_one_site_that_fails(run, finished):
    model = GPT.from_pretrained("out/demo/model")
    model.set_ln_mode("ln_1v", 2, "real")
    model.save_pretrained("half")
    lines = run("eval.py", "--verify", "--models=half").text.splitlines()
    assert lines[:2] == ["half: NOT LN-free", "  h.2.ln_1v is still real"] and lines[2].startswith("  h.2.ln_1v is not affine") and len(lines) == 3
    model.set_ln_mode("ln_1v", 2, "fake")
    model.set_treatment("bos", True)
    model.save_pretrained("treated")
    assert "the bos treatment is still on" in run("eval.py", "--verify", "--models=treated").text


def test_verify_finds_what_is_hidden_in_a_folded_model(finished):
    from residual import why_not_ln_free

    class Scale(torch.nn.Module):
        def forward(self, x):
            return x / x.std(-1, keepdim=True)

    folded = GPT.from_pretrained("out/demo/model").fold()
    fc = folded.transformer.h[1].mlp.c_fc
    assert why_not_ln_free(folded) == []
    fc.register_forward_hook(lambda module, args, out: Scale()(out))
    assert [r.split(":")[0] for r in why_not_ln_free(folded)] == ["transformer.h.1.mlp.c_fc is not affine"]
    folded = GPT.from_pretrained("out/demo/model").fold()
    folded.transformer.extra = torch.nn.RMSNorm(192)
    assert why_not_ln_free(folded) == ["transformer.extra is a RMSNorm"]


def test_the_picture_names_every_event(run, finished, monkeypatch):
    from matplotlib.figure import Figure

    real_savefig, figures = Figure.savefig, []
    monkeypatch.setattr(Figure, "savefig", lambda fig, path, **k: (figures.append(fig), real_savefig(fig, path, **k)))
    done = run("plot.py", "out/demo")
    assert done.code == 0 and open("out/demo/loss.png", "rb").read(4) == b"\x89PNG"
    top, low = figures[0].axes
    texts = {text.get_text(): round(text.get_position()[0]) for text in top.texts}
    assert texts == {"h.0.ln_2": 1, "h.1.ln_2": 2, "h.2.ln_2": 3, "h.3.ln_2": 4, "h.0.ln_1qk + 3 more": 5, "h.0.ln_1v": 6, "h.1.ln_1v": 7,
                     "h.2.ln_1v": 8, "h.3.ln_1v, ln_f": 9, "eot off, bos off": 10}
    free = [e["loss"] for e in map(json.loads, open("out/demo/log.jsonl")) if "loss" in e]
    control = [e["loss"] for e in map(json.loads, open("out/demo_control/log.jsonl")) if "loss" in e]
    assert np.allclose(top.lines[0].get_ydata(), free) and np.allclose(low.lines[0].get_ydata(), np.subtract(free, control))


def test_a_picture_of_what_is_not_a_run_is_refused(run, tmp_path):
    assert "is not the out_dir of a run" in run("plot.py", "nothing").text
    assert "is not the out_dir of a run" in run("plot.py", __file__).text
    assert run("plot.py").code == 1 and os.listdir(tmp_path) == []
