# After any config, and before control.py: distil from the original, half cross-entropy, half KL(original || model).
# docs/results.md has what that buys.
kl_share = 0.5
out_dir = out_dir + "_faithful"
