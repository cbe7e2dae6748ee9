"""export.py: the same logits in transformers, TransformerLens and nnsight; what is refused; the upload."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, random_hf, set_all_fake

import export
from model import GPT

def logits_of(model, idx):
    with torch.no_grad():
        out = model(idx)
    return out.logits if hasattr(out, "logits") else out[0] if isinstance(out, tuple) else out


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """GPT-2 small's shape, random, all sites fake with constants as they would be measured; qk's and v's differ."""
    folder = tmp_path_factory.mktemp("small")
    random_hf(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024).save_pretrained(folder)
    model = GPT.from_pretrained(folder).eval()
    for i in range(2):  # ln_1v is measured behind ln_1qk, on another batch
        model.measure_std(torch.randint(0, 50000, (2, 32 + 32 * i)))
        for layer in range(12):
            model.set_ln_mode("ln_1v" if i else "ln_1qk", layer, "fake")
    set_all_fake(model)
    assert all(block.ln_1qk.avg_std != block.ln_1v.avg_std for block in model.transformer.h)
    return model


@pytest.fixture
def removed(ln_free_run):
    return GPT.from_pretrained(ln_free_run + "/model").eval()


def plain(model, folder):
    """transformers' own class, from the plain form on disk."""
    from transformers import GPT2LMHeadModel

    export.plain_form(model).save_pretrained(folder)
    return GPT2LMHeadModel.from_pretrained(folder).eval()


def centred(logits):
    return logits - logits.mean(-1, keepdim=True)


# --- the forms


@pytest.mark.parametrize("which", ["removed", "small"])
def test_every_form_has_the_same_logits(which, request, tmp_path):
    model = request.getfixturevalue(which)
    idx = torch.randint(0, 256, (2, 60))
    idx[0, 9] = model.config.eot
    expected = logits_of(model, idx)
    torch.testing.assert_close(logits_of(export.folded_form(model), idx), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logits_of(plain(model, tmp_path), idx), expected, atol=1e-3, rtol=0)
    again = GPT.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits_of(again, idx), expected, atol=1e-4, rtol=0)
    assert again.ln_free() and json.load(open(tmp_path / "config.json"))["model_type"] == "gpt2"
    bridge = export.to_bridge(model)
    torch.testing.assert_close(logits_of(bridge, idx), expected, atol=1e-4, rtol=0)
    bridge.enable_compatibility_mode(disable_warnings=True)  # it centres the unembedding: the same distribution
    torch.testing.assert_close(centred(logits_of(bridge, idx)), centred(expected), atol=1e-4, rtol=0)


def test_the_plain_form_holds_in_bfloat16(small, tmp_path):
    """What bfloat16 changes is no more than on an ordinary GPT-2 of the same weights."""
    idx = torch.randint(0, 50000, (1, 60))
    ordinary = random_hf(n_layer=12, n_head=12, n_embd=768, vocab_size=50257, n_positions=1024)
    off = [(logits_of(hf.bfloat16(), idx).float() - logits_of(hf.float(), idx)).abs().max() for hf in (plain(small, tmp_path), ordinary)]
    assert off[0] < 3 * off[1]


def test_published_ln_free_models_convert_to_all_forms(removed, tmp_path):
    """A directory as apollo-research/gpt2_noLN is: no LN-free flag but layer_norm_epsilon 1e12 and weights times 1e6."""
    plain(removed, tmp_path / "published")
    published = GPT.from_pretrained(tmp_path / "published").eval()
    idx = torch.randint(0, 256, (1, 60))
    expected = logits_of(removed, idx)
    for model in (published.fold(), plain(published, tmp_path / "again"), export.to_bridge(published)):
        torch.testing.assert_close(logits_of(model, idx), expected, atol=2e-4, rtol=0)


# --- TransformerLens 4


def test_direct_logit_attribution_is_exact_without_layernorm_and_only_then(removed):
    """Each component's output times the unembedding: their sum is the logit on the LN-free model, and is far from it with LN."""
    idx = torch.randint(0, 256, (1, 60))

    def apart(bridge, W, b):
        logits, cache = bridge.run_with_cache(idx)
        parts = [cache["hook_embed"], cache["hook_pos_embed"]] + [cache[f"blocks.{i}.hook_{name}_out"] for i in range(4) for name in ("attn", "mlp")]
        return (sum(part @ W.T for part in parts) + b - logits).abs().max().item()

    with torch.no_grad():
        head = removed.fold().lm_head
        assert apart(export.to_bridge(removed), head.weight, head.bias) < 1e-4
        from transformer_lens.model_bridge import TransformerBridge

        original = GPT.from_pretrained(TINY)  # with LN, the unembedding folded as far as it goes: weight and centring, and the mean std
        original.measure_std(idx)
        head = set_all_fake(original).fold().lm_head
        assert apart(TransformerBridge.boot_transformers(TINY), head.weight, head.bias) > 1


def test_hooks_of_the_bridge_change_the_logits_as_our_own_do(removed):
    idx = torch.randint(0, 256, (1, 30))
    bridge = export.to_bridge(removed)
    hooked = bridge.run_with_hooks(idx, fwd_hooks=[("blocks.1.hook_mlp_out", lambda value, hook: value * 0)])
    removed.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: out * 0)
    torch.testing.assert_close(hooked, logits_of(removed, idx), atol=1e-4, rtol=0)


# --- nnsight


@pytest.mark.parametrize("which", ["removed", "small"])
def test_nnsight_reads_and_patches_the_folded_model(which, request):
    from nnsight import NNsight

    removed = request.getfixturevalue(which)
    folded, idx, seen = removed.fold().eval(), torch.randint(0, 256, (1, 30)), []
    traced = NNsight(folded)
    with traced.trace(idx):
        mlp = traced.transformer.h[1].mlp.output.save()
        logits = traced.output[0].save()
    with traced.trace(idx):
        traced.transformer.h[1].mlp.output[:] = 0
        patched = traced.output[0].save()
    torch.testing.assert_close(logits, logits_of(removed, idx), atol=1e-4, rtol=0)
    hook = folded.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: (seen.append(out), out * 0)[1])
    assert torch.equal(patched, logits_of(folded, idx)) and torch.equal(mlp, seen[0]) and not torch.equal(patched, logits)
    hook.remove()


# --- the files


@pytest.fixture
def gpt2_run(tmp_path, run, gpt2_tokenizer):
    """An out_dir with an LN-free random model of GPT-2's vocabulary, with its evaluation and settings."""
    random_hf(vocab_size=50257).save_pretrained("hf")
    model = GPT.from_pretrained("hf").eval()
    model.measure_std(torch.randint(0, 50000, (2, 64)))
    set_all_fake(model).save_pretrained("out/mine/model")
    row = dict(dataset="owt", role="ln_free", loss=3.014, loss_se=0.002, gap=0.025, gap_se=0.001)
    json.dump(dict(rows=[row]), open("out/mine/eval.json", "w"))
    json.dump(dict(learning_rate=6e-4), open("out/mine/settings.json", "w"))
    return model


def test_the_export_opens_in_a_pipeline_with_its_tokenizer_and_card(run, gpt2_run):
    import tiktoken
    from transformers import AutoTokenizer, pipeline

    done = run("export.py", "out/mine", "--to=hf")
    assert done.code == 0 and "out/mine/hf: README.md, config.json, generation_config.json, merges.txt, model.safetensors, tokenizer_config.json, vocab.json" in done.text
    text = "Hello, naïve world!  def f(x):\n\treturn x<|endoftext|>"
    assert AutoTokenizer.from_pretrained("out/mine/hf")(text).input_ids == tiktoken.get_encoding("gpt2").encode(text, allowed_special="all")
    written = pipeline("text-generation", "out/mine/hf")("Once upon a time", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    ours = run("sample.py", "out/mine", "--prompt=Once upon a time", "--max_new_tokens=8", "--temperature=0")
    assert ours.text == written + "\n"
    card = open("out/mine/hf/README.md").read()
    assert "| owt | LN-free | 3.0140 ± 0.0020 | +0.0250 ± 0.0010 |" in card and "learning_rate" in card and "TransformerBridge.boot_transformers" in card and "hf.tmp" not in card


def test_the_folded_export_is_read_by_from_pretrained_and_has_no_layernorm(run, gpt2_run):
    done = run("export.py", "out/mine", "--to=folded", "--out=folded")
    assert done.code == 0 and 0 < within(done) < 1e-4
    folded = GPT.from_pretrained("folded").eval()
    idx = torch.randint(0, 50000, (1, 40))
    torch.testing.assert_close(logits_of(folded, idx), logits_of(gpt2_run, idx), atol=1e-4, rtol=0)
    assert not folded.sites() and folded.lm_head.bias is not None and folded.lm_head.weight is not folded.transformer.wte.weight


def within(done):
    """What export.py says of its logits."""
    return float(re.search(r"within (\S+) of", done.text)[1])


def test_an_eps_that_is_too_small_is_seen_in_what_it_says(run, gpt2_run):
    done = run("export.py", "out/mine", "--eps=2")
    plain, idx = GPT.from_pretrained("out/mine/hf").eval(), torch.from_numpy(np.random.default_rng(0).integers(0, 50257, (1, 64)))
    assert plain.ln_free() and within(done) > 0.01  # ours reads it as LN-free; transformers divides by sqrt(var + 2)
    from transformers import GPT2LMHeadModel

    off = (logits_of(GPT2LMHeadModel.from_pretrained("out/mine/hf").eval(), idx) - logits_of(gpt2_run, idx)).abs().max().item()
    assert within(done) == pytest.approx(off, rel=0.06)


def test_a_model_whose_logits_are_not_finite_is_not_exported(run, gpt2_run):
    with torch.no_grad():
        gpt2_run.transformer.wpe.weight[3] = float("nan")
    gpt2_run.save_pretrained("bad")
    done = run("export.py", "bad")
    assert done.code == 1 and "its logits are not finite" in done.text and not os.path.exists("bad_hf")


def test_float16_needs_a_smaller_eps_and_then_works(run, gpt2_run):
    from transformers import GPT2LMHeadModel

    done = run("export.py", "out/mine", "--dtype=float16")
    assert done.code == 1 and "float16 ends at 65504" in done.text and "--eps=" in done.text and not os.path.exists("out/mine/hf")
    advised = done.text.rpartition("--eps=")[2].strip()
    done = run("export.py", "out/mine", "--dtype=float16", f"--eps={advised}")
    assert done.code == 0 and 0 < within(done) < 0.05
    hf = GPT2LMHeadModel.from_pretrained("out/mine/hf")
    assert hf.dtype == torch.float16 and all(p.isfinite().all() for p in hf.parameters())
    idx = torch.randint(0, 50000, (1, 40))
    torch.testing.assert_close(logits_of(hf.eval().float(), idx), logits_of(gpt2_run, idx), atol=0.05, rtol=0)


def test_lm_evaluation_harness_scores_the_export(run, gpt2_run, tmp_path):
    import lm_eval

    assert run("export.py", "out/mine").code == 0
    rows = [json.loads(line) for line in open(os.path.join(REPO, "tests", "hellaswag_42.jsonl"))][:10]
    with open("task.jsonl", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    with open("endings.yaml", "w") as f:
        f.write(f"""task: endings
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {tmp_path}/task.jsonl}}, cache_dir: {tmp_path}/cache}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{ctx}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: "{{{{endings}}}}"
metric_list: [{{metric: acc}}]
""")
    result = lm_eval.simple_evaluate(model="hf", model_args="pretrained=out/mine/hf,dtype=float32,device=cpu", tasks=["endings"], task_manager=lm_eval.tasks.TaskManager(include_path="."), bootstrap_iters=0)
    import hellaswag
    import tiktoken

    sums, _ = hellaswag.score(gpt2_run, [(r["ctx"], r["endings"], r["label"]) for r in rows], tiktoken.get_encoding("gpt2").encode_ordinary, "cpu", torch.no_grad())
    assert result["results"]["endings"]["acc,none"] == pytest.approx((sums.argmin(1) == [r["label"] for r in rows]).mean())


# --- bad input


def test_a_run_that_is_not_finished_names_the_sites_that_are_still_real(run, removed):
    removed.set_ln_mode("ln_2", 3, "real")
    removed.save_pretrained("half/model")
    assert "not LN-free: still real are h.3.ln_2\n" in run("export.py", "half").text + "\n"
    os.makedirs("broken")
    torch.save(dict(ln_state=removed.ln_state()), "broken/ckpt.pt")
    assert "broken is not finished: still real are h.3.ln_2; go on with --init_from=resume" in run("export.py", "broken").text
    os.truncate("broken/ckpt.pt", 100)
    assert "broken/ckpt.pt is not a whole checkpoint" in run("export.py", "broken").text
    assert "still real are h.0.ln_1qk, h.0.ln_1v" in (text := run("export.py", TINY).text) and "and 7 more sites" in text
    removed.set_ln_mode("ln_2", 3, "fake")
    removed.set_treatment("bos", True)
    removed.save_pretrained("treated")
    assert "a treatment (bos or eot) is still on" in run("export.py", "treated").text
    assert sorted(os.listdir()) == ["broken", "half", "treated"]


@pytest.mark.parametrize("args, message", [
    (["--to=onnx"], "--to is 'onnx', but it must be hf or folded"), (["--dtype=int8"], "it must be float32, bfloat16 or float16"), (["--out=there"], "there exists: remove it"),
    (["--eps=0.5"], "must be above 1"), (["--out=there.txt/x"], "there.txt/x"),
])
def test_bad_settings_end_in_one_line(run, removed, args, message, tmp_path):
    removed.save_pretrained("mine")
    os.makedirs("there")
    open("there.txt", "w").close()
    done = run("export.py", "mine", *args)
    assert done.code == 1 and message in done.text and done.text.count("\n") <= 1 and sorted(os.listdir()) == ["mine", "there", "there.txt"]


def test_no_source_a_folded_source_and_no_tokenizer(run, removed):
    assert "usage: python export.py" in run("export.py").text and "usage: python export.py" in run("export.py", "--to=hf").text
    assert "nowhere is not a directory here" in run("export.py", "nowhere").text
    removed.fold().save_pretrained("folded")
    assert "export the unfolded model" in run("export.py", "folded").text
    done = run("export.py", "folded", "--to=folded")
    assert done.code == 0 and "no tokenizer files: end-of-text 256 is not GPT-2's" in done.text and os.path.isdir("folded_folded")


# --- upload


def test_push_asks_and_uploads_what_was_written(removed, tmp_path):
    from tiny_hub import serve

    removed.save_pretrained(tmp_path / "mine")
    command = [sys.executable, os.path.join(REPO, "export.py"), "mine", "--push=org/mine"]
    with serve({}) as hub:
        env = os.environ | hub.env | {"HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "secret"}
        push = lambda answer: subprocess.run(command, cwd=tmp_path, env=env, input=answer, capture_output=True, text=True)
        no = push("n\n")
        assert no.returncode == 1 and "not uploaded; mine_hf stays" in no.stderr and not hub.uploaded
        os.rename(tmp_path / "mine_hf", tmp_path / "kept")
        yes = push("y\n")
        assert yes.returncode == 0 and "uploaded to " in yes.stdout, yes.stderr
        assert hub.uploaded["org/mine"].keys() == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
        assert all((tmp_path / "mine_hf" / name).read_bytes() == content for name, content in hub.uploaded["org/mine"].items())
        env["HF_TOKEN"] = "wrong"
        os.rename(tmp_path / "mine_hf", tmp_path / "kept_too")
        refused = push("y\n")
        assert refused.returncode == 1 and "can't upload to org/mine" in refused.stderr and "Traceback" not in refused.stderr
