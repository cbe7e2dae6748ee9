# After any config, and before control.py: learn from the original as much as from the text, and remove the LayerNorms
# in a quarter of the time, which leaves more steps to recover. docs/results.md has what each line does.
assert ln_schedule, "name it after a config that has an ln_schedule, and before control.py"
kl_share = 0.5  # half cross-entropy, half KL(original || model)
hidden_weight = 1.0  # keeps the residual streams near the original's; in longer runs, 0 gives a lower loss
noise_share = 0.125  # random tokens: those that the text does not have can explode otherwise


def _sooner(at):
    """A step, a fraction of the run, or a pair of them."""
    return tuple(map(_sooner, at)) if isinstance(at, (list, tuple)) else type(at)(at / 4)


ln_schedule = [(sites, _sooner(first), gap and gap // 4) for sites, first, gap in ln_schedule]
out_dir = out_dir + "_faithful"
