"""
eval.py --verify: a finished removal passes; whatever still divides by a std is found and named.
"""
import torch
from conftest import TINY

from model import GPT
from parts.verify import problems


def test_verify_passes_what_a_removal_leaves_and_fails_the_rest(run, finished):
    done = run("eval.py", "--verify")
    assert done.code == 0, done.text
    assert done.text.startswith("out/demo: LN-free")

    GPT.from_pretrained("out/demo/model").fold().save_pretrained("folded")
    assert run("eval.py", "--verify", "--models=folded").code == 0

    for source in (TINY, "out/demo_control"):
        done = run("eval.py", "--verify", f"--models={source}")
        assert done.code == 1
        assert "NOT LN-free" in done.text
        for site in GPT.from_pretrained(TINY).ln_modes():
            assert f"{site} is still real" in done.text
            assert f"{site} is not affine" in done.text


def test_verify_names_the_one_site_that_fails(run, finished):
    model = GPT.from_pretrained("out/demo/model")
    model.set_ln_mode("ln_1v", 2, "real")
    model.save_pretrained("half")
    done = run("eval.py", "--verify", "--models=half")
    assert done.code == 1
    lines = done.text.splitlines()
    assert len(lines) == 3
    assert lines[0] == "half: NOT LN-free"
    assert lines[1] == "  h.2.ln_1v is still real"
    assert lines[2].startswith("  h.2.ln_1v is not affine")

    model.set_ln_mode("ln_1v", 2, "fake")
    model.set_treatment("bos", True)
    model.save_pretrained("treated")
    done = run("eval.py", "--verify", "--models=treated")
    assert done.code == 1
    assert "the bos treatment is still on" in done.text


def test_verify_finds_a_std_or_a_norm_hidden_in_a_folded_model(finished):
    model = GPT.from_pretrained("out/demo/model").fold()
    assert problems(model) == []

    model.transformer.h[1].mlp.c_fc.register_forward_hook(lambda module, args, out: out / out.std(-1, keepdim=True))
    (reason,) = problems(model)
    assert reason.split(":")[0] == "transformer.h.1.mlp.c_fc is not affine"

    model = GPT.from_pretrained("out/demo/model").fold()
    model.transformer.extra = torch.nn.RMSNorm(192)
    assert problems(model) == ["transformer.extra is a RMSNorm"]
