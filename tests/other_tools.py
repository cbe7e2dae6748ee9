"""
The plain form and to_hooked's in tools that don't fit into one environment. Each test needs an environment with its
tool beside requirements.txt and pytest, and is skipped elsewhere.

    python -m pytest -q -rs tests/other_tools.py
"""
import pytest
import torch
from conftest import without_layernorm
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2LMHeadModel

from parts.tokenizer import copy_tokenizer
from tools import export


@pytest.fixture
def removed(own_model):
    """A random model of 3 layers with a byte-level BPE of its own; LN-free."""
    model = without_layernorm(own_model)
    model.config.eot = 0
    return model


@pytest.fixture
def plain(removed, own_model, tmp_path):
    """Its directory, as tools.export --to=hf writes it."""
    export.plain_form(removed).save_pretrained(tmp_path)
    copy_tokenizer(own_model, tmp_path)
    return str(tmp_path)


@pytest.fixture
def ids():
    return torch.randint(1, 299, (1, 20))


@pytest.fixture
@torch.no_grad()
def logits(removed, ids):
    return removed(ids)[0]


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_nnterp(plain, ids, logits):
    """1.3.0 wants nnsight below 0.8."""
    nnterp = pytest.importorskip("nnterp")
    model = nnterp.StandardizedTransformer(plain)
    with model.trace(ids):
        middle = model.layers_output[1].save()
        found = model.logits.save()
    assert middle.shape == (1, 20, 64)
    assert_close(found.float().cpu(), logits)


def test_pyvene(plain, ids, logits):
    pyvene = pytest.importorskip("pyvene")
    model = GPT2LMHeadModel.from_pretrained(plain).eval()
    zero = dict(layer=1, component="mlp_output", intervention_type=pyvene.ZeroIntervention)
    with torch.no_grad():
        changeable = pyvene.IntervenableModel(pyvene.IntervenableConfig([zero]), model=model)
        where = {"base": [*range(20)]}
        before, after = changeable({"input_ids": ids}, unit_locations=where, output_original_output=True)
        model.transformer.h[1].mlp.register_forward_hook(lambda module, args, out: out * 0)
        assert_close(before.logits, logits)
        assert_close(after.logits, model(ids).logits)
    assert not torch.allclose(after.logits, logits, atol=0.1)


def test_sae_lens(removed, ids, logits):
    """A sparse autoencoder of random weights, spliced into the residual stream."""
    sae_lens = pytest.importorskip("sae_lens")
    hooked = export.to_hooked(removed)
    model = sae_lens.HookedSAETransformer(hooked.cfg)
    model.load_state_dict(hooked.state_dict())
    config = sae_lens.StandardSAEConfig(d_in=64, d_sae=128)
    config.metadata.hook_name = "blocks.1.hook_resid_pre"
    sae = sae_lens.StandardSAE(config)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.1 * torch.randn_like(p))
        assert_close(model(ids), logits)
        spliced = model.run_with_saes(ids, saes=[sae], use_error_term=False)
        by_hand = ("blocks.1.hook_resid_pre", lambda x, hook: sae.decode(sae.encode(x)))
        assert_close(spliced, model.run_with_hooks(ids, fwd_hooks=[by_hand]))
    assert not torch.allclose(spliced, logits, atol=0.1)


def test_circuit_tracer(plain, ids, logits):
    """It hooks the scale of LayerNorms, so they must be there; with eps 1e12 it is a constant. Random transcoders."""
    pytest.importorskip("circuit_tracer")
    from circuit_tracer import attribute
    from circuit_tracer.replacement_model.replacement_model_transformerlens import TransformerLensReplacementModel
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    hf = GPT2LMHeadModel.from_pretrained(plain).eval()
    config = HookedTransformerConfig(
        n_layers=3, n_heads=4, d_model=64, d_head=16, d_mlp=256, n_ctx=32, d_vocab=300, normalization_type="LN",
        eps=hf.config.layer_norm_epsilon, act_fn="gelu_new", default_prepend_bos=False, model_name="gpt2", device="cpu")
    hooked = HookedTransformer(config)
    as_it_is = dict(fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    hooked.load_and_process_state_dict(convert_gpt2_weights(hf, hooked.cfg), **as_it_is)
    transcoders = {}
    for i in range(3):
        transcoders[i] = SingleLayerTranscoder(64, 128, F.relu, i, device="cpu", dtype=torch.float32)
        for p in transcoders[i].parameters():
            p.data.normal_(std=0.1)
    transcoders = TranscoderSet(transcoders, "mlp.hook_in", "mlp.hook_out")
    tokenizer = AutoTokenizer.from_pretrained(plain, bos_token="<end>", pad_token="<end>")
    model = TransformerLensReplacementModel.from_config(config, transcoders, tokenizer=tokenizer)
    weights = hooked.state_dict()
    renamed = {key: key.replace(".old_mlp", "").replace(".old_unembed", "") for key in model.state_dict()}
    model.load_state_dict({key: weights.get(name, model.state_dict()[key]) for key, name in renamed.items()})
    with torch.no_grad():
        assert_close(model(ids), logits)
    prompt = torch.cat([torch.tensor([0]), ids[0, :10]])  # it wants a special token in front
    graph = attribute(prompt, model, verbose=False, batch_size=64, max_n_logits=3)
    with torch.no_grad():
        assert graph.logit_tokens.tolist() == hooked(prompt[None])[0, -1].topk(3).indices.tolist()
