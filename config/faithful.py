# After another config, and before control.py: the same run, which learns from the model that it starts from too,
# half from its distribution and half from the text. RESULTS.md: what that buys.
kl_share = 0.5
out_dir = out_dir + "_faithful"
