"""
model.py: the same function as GPT-2, LayerNorms that switch to constants, folding, what is on disk, and the file
alone, copied into another project.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPO, TINY, random_hf, set_all_fake
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from model import GPT, GPTConfig, LayerNorm

WIDE = dict(n_layer=2, n_head=12, n_embd=768, vocab_size=1000, n_positions=1024)


@pytest.fixture
def hf_and_ours(tmp_path):
    """hf_and_ours(**shape): a random GPT2LMHeadModel of transformers, and our GPT from its directory."""

    def make(**shape):
        hf = random_hf(**shape)
        hf.save_pretrained(tmp_path / "hf")
        return hf, GPT.from_pretrained(tmp_path / "hf").eval()

    return make


@pytest.fixture
def tiny():
    return GPT.from_pretrained(TINY).eval()


def tiny_tokens(B=4, T=256):
    """Windows of a Python source file as bytes, an end-of-text inside each."""
    with open(json.__file__, "rb") as f:
        idx = torch.tensor(list(f.read()[: B * T])).view(B, T).clone()
    idx[:, T // 3] = 256
    return idx


# --- the same function as GPT-2


@pytest.mark.parametrize("shape", [dict(), WIDE, "bundled"])
def test_logits_and_loss_equal_transformers(hf_and_ours, tiny, shape):
    if shape == "bundled":
        hf, model, idx = AutoModelForCausalLM.from_pretrained(TINY).eval(), tiny, tiny_tokens()
    else:
        (hf, model), idx = hf_and_ours(**shape), torch.randint(0, 300, (2, 96))
    with torch.no_grad():
        logits, loss = model(idx[:, :-1], idx[:, 1:])
        theirs = hf(idx, labels=idx)
    torch.testing.assert_close(logits, theirs.logits[:, :-1], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, theirs.loss, atol=1e-5, rtol=0)


def test_weights_initialise_as_gpt2s():
    model = GPT(GPTConfig(n_layer=8, n_head=4, n_embd=256, vocab_size=500, block_size=128))
    for name, p in model.named_parameters():
        if p.dim() == 1:
            expected = 1 if ".ln_" in name and name.endswith("weight") else 0
            assert (p == expected).all(), name
        else:
            expected = 0.02 / math.sqrt(16) if name.endswith("c_proj.weight") else 0.02
            assert abs(p.std().item() / expected - 1) < 0.03, name


# --- sites, modes, constants and folding


def test_sites_have_the_names_of_the_design_and_are_real_at_first(tiny):
    assert list(tiny.ln_modes())[:4] == ["h.0.ln_1qk", "h.0.ln_1v", "h.0.ln_2", "h.1.ln_1qk"]
    assert set(tiny.ln_modes().values()) == {"real"}
    assert not tiny.bos_on and not tiny.eot_on
    with torch.device("meta"):
        assert len(GPT(GPTConfig()).ln_modes()) == 37  # GPT-2 small
    tiny.set_ln_mode("ln_1v", 2, "fake")
    assert tiny.transformer.h[2].ln_mode == {"ln_1qk": "real", "ln_1v": "fake", "ln_2": "real"}


@pytest.mark.parametrize("method, args", [
    ("set_ln_mode", ("ln_2", 99, "fake")),
    ("set_ln_mode", ("ln_f", 0, "fake")),
    ("set_ln_mode", ("ln_2", 0, "off")),
    ("set_treatment", ("ln_2", True)),
    ("measure_std", (torch.tensor([[5], [6]]),)),  # no ordinary token
    ("fold", ()),
])
def test_what_can_not_be_done_is_refused(tiny, method, args):
    before = tiny.ln_state()
    with pytest.raises(ValueError):
        getattr(tiny, method)(*args)
    assert tiny.ln_state() == before


def test_a_fake_layernorm_computes_in_float32_under_autocast():
    site = LayerNorm(GPTConfig(n_embd=64))
    site.ln_mode = "fake"
    x = torch.randn(2, 3, 64)
    use_bos = torch.tensor(False)
    with torch.autocast("cpu", torch.bfloat16):
        assert site(x, use_bos).dtype == site(x.bfloat16(), use_bos).dtype == torch.float32


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eot", [False, True])
def test_fake_sites_centre_divide_by_a_constant_and_are_affine(bos, eot, bias):
    """In numpy. The treatments give position 0 a constant of its own, and end-of-text on the value path."""
    model = GPT(GPTConfig(block_size=60, vocab_size=257, n_layer=2, n_head=2, n_embd=16, bias=bias, eot=256)).double()
    for p in model.parameters():
        nn.init.normal_(p)
    for site in set_all_fake(model).sites().values():
        site.avg_std.fill_(2.5)
        site.bos_std.fill_(40.0)
    model.set_treatment("bos", bos)
    model.set_treatment("eot", eot)
    seen = {}
    for site in model.sites().values():
        site.register_forward_hook(lambda site, args, out: seen.update({site: (args[0], out)}))
    with torch.no_grad():
        model(tiny_tokens(2, 60))
    for name, site in model.sites().items():
        constant = np.full((2, 60, 1), 2.5)
        if bos:
            constant[:, 0] = 40
        if eot and name.endswith("ln_1v"):
            constant[:, 20] = 40  # where tiny_tokens has its end-of-text
        x, out = (t.numpy() for t in seen[site])
        weight, shift = (0 if p is None else p.detach().numpy() for p in (site.weight, site.bias))
        expected = (x - x.mean(-1, keepdims=True)) / constant * weight + shift
        np.testing.assert_allclose(out, expected, atol=1e-9)


def test_query_and_key_read_ln_1qk_and_value_reads_ln_1v(hf_and_ours):
    """With value alone fake, the block is transformers' attention pattern on rescaled values."""
    hf, model = hf_and_ours()
    block, theirs = model.transformer.h[0], hf.transformer.h[0]
    x = torch.randn(2, 10, 64)
    block.ln_1v.avg_std.fill_(3.0)
    block.ln_1v.ln_mode = "fake"
    no_bos = torch.tensor(False)
    with torch.no_grad():
        ours = block.attn(block.ln_1qk(x, no_bos), block.ln_1v(x, no_bos))

        q, k, _ = theirs.attn.c_attn(theirs.ln_1(x)).split(64, 2)
        y = (x - x.mean(-1, keepdim=True)) / 3.0 * theirs.ln_1.weight + theirs.ln_1.bias
        v = theirs.attn.c_attn(y).split(64, 2)[2]
        q, k, v = (t.view(2, 10, 4, 16).transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        expected = theirs.attn.c_proj(y.transpose(1, 2).reshape(2, 10, 64))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


def test_constants_are_measured_from_a_batch_where_a_site_is_real(hf_and_ours):
    """Against the residual stream that transformers shows."""
    hf, model = hf_and_ours()
    idx = torch.randint(0, 290, (3, 40))
    idx[1, 7] = 299  # end-of-text: neither ordinary nor position 0

    read = {}  # {a LayerNorm's name in transformers: its input}
    for name, module in hf.transformer.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, args, name=name: read.update({name: args[0].double()}))
    with torch.no_grad():
        hf(idx)

    model.measure_std(idx)
    model.set_ln_mode("ln_2", 0, "fake")
    constants = {name: (site.avg_std.item(), site.bos_std.item()) for name, site in model.sites().items()}
    model.measure_std(idx.flip(1))

    ordinary = (idx != 299) & (torch.arange(40) > 0)
    for name, site in model.sites().items():
        x = read[re.sub("ln_1.*", "ln_1", name)]
        std = (x.pow(2).mean(-1) - x.mean(-1).pow(2) + 1e-5).sqrt()
        expected = std[ordinary].mean().item(), std[:, 0].mean().item()
        assert constants[name] == pytest.approx(expected, rel=1e-5), name
        assert (site.avg_std.item() == constants[name][0]) == (name == "h.0.ln_2"), name


@pytest.mark.parametrize("bias", [True, False])
def test_folded_equals_unfolded_and_has_no_layernorm(hf_and_ours, bias):
    model = hf_and_ours()[1]
    if not bias:
        model = GPT(replace(model.config, bias=False)).eval()
    idx = torch.randint(0, 300, (2, 96))
    model.measure_std(idx)
    for site in set_all_fake(model).double().sites().values():
        site.avg_std.mul_(0.5 + torch.rand(()))  # ln_1qk and ln_1v, which read the same, differ
    model.set_treatment("eot", True)
    with pytest.raises(ValueError, match="eot"):
        model.fold()
    model.set_treatment("eot", False)
    folded = model.fold()
    with torch.no_grad():
        torch.testing.assert_close(folded(idx)[0], model(idx)[0], atol=1e-10, rtol=0)

    assert not any("ln_" in name for name in folded.state_dict())
    assert not any("norm" in type(module).__name__.lower() for module in folded.modules())
    assert folded.ln_free()
    with pytest.raises(ValueError, match="folded"):
        folded.fold()


# --- on disk, and the file alone


@pytest.mark.parametrize("folded", [False, True])
def test_modes_constants_and_treatments_survive_save_and_load(tiny, tmp_path, folded):
    tiny.measure_std(tiny_tokens())
    if folded:
        tiny = set_all_fake(tiny).fold()
    else:
        tiny.set_ln_mode("ln_2", 0, "fake")
        tiny.set_ln_mode("ln_1v", 3, "fake")
        tiny.set_treatment("bos", True)
    tiny.save_pretrained(tmp_path)
    again = GPT.from_pretrained(tmp_path).eval()
    assert again.ln_state() == tiny.ln_state()
    assert torch.equal(again(tiny_tokens())[0], tiny(tiny_tokens())[0])


def test_all_real_is_a_plain_gpt2_directory(hf_and_ours, tmp_path):
    hf, model = hf_and_ours()
    model.save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for (name, p), q in zip(hf.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("folded", [False, True])
def test_transformers_refuses_what_is_not_a_plain_gpt2(tiny, tmp_path, folded):
    model = set_all_fake(tiny)
    (model.fold() if folded else model).save_pretrained(tmp_path)
    for loader in (AutoModelForCausalLM, GPT2LMHeadModel):
        with pytest.raises((ValueError, KeyError)):
            loader.from_pretrained(tmp_path)


def test_the_original_hub_layout_without_prefix_and_with_mask_buffers_loads(hf_and_ours, tmp_path):
    """gpt2's own files name tensors `h.0...` and hold `h.0.attn.bias`, the causal mask."""
    model = hf_and_ours()[1]
    path = tmp_path / "hf/model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 96, 96)}, path)
    again = GPT.from_pretrained(tmp_path / "hf").eval()
    idx = torch.randint(0, 300, (1, 20))
    assert torch.equal(again(idx)[0], model(idx)[0])


# -I keeps today's folder and PYTHONPATH out: its own modules are found nowhere but in the folder that it is given
ALONE = '''
import importlib.util, json, sys
sys.path.insert(0, sys.argv[1])
import torch
import model
from model import GPT, GPTConfig, config_from_hf

assert model.__file__.startswith(sys.argv[1]) and importlib.util.find_spec("parts") is None
gpt = GPT(GPTConfig(block_size=24, vocab_size=60, n_layer=2, n_head=2, n_embd=32, eot=59)).double().eval()
idx = torch.randint(0, 60, (3, 24))
gpt(idx[:, :-1], idx[:, 1:])[1].backward()
gpt.measure_std(idx)
for site in gpt.sites().values():
    site.ln_mode = "fake"
for form in (gpt, gpt.fold()):
    hf = json.loads(json.dumps(form.hf_config()))
    again = GPT(config_from_hf(hf)).double().eval()
    again.load_hf(hf, {name: tensor.clone() for name, tensor in form.hf_tensors().items()})
    assert again.ln_state() == form.ln_state() and again.config == form.config
    torch.testing.assert_close(again(idx)[0], gpt(idx)[0], atol=1e-10, rtol=0)
assert not {"parts", "safetensors", "huggingface_hub", "transformers"} & set(sys.modules)
'''


def test_model_py_alone_in_an_empty_folder_needs_nothing_but_torch(tmp_path):
    shutil.copy(os.path.join(REPO, "model.py"), tmp_path)
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
