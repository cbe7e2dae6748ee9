# After another config: the same run, which learns from the distribution of the model that it starts from too.
kl_share = 0.5
out_dir = out_dir + "_faithful"
